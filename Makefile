# nsqd: one header, one program. `make run` starts it on loopback, `make test` builds and tests it.

CXX      ?= g++
STD      ?= c++17
OPT      ?= -O2
TEST_OPT ?= -O0 -g
WERROR   ?=
WARNINGS  = -Wall -Wextra -Wpedantic -Wshadow -Wconversion $(WERROR)
CXXFLAGS  = -std=$(STD) $(WARNINGS) -pthread -I.
PREFIX   ?= /usr/local
BUILD    ?= .build
FUZZ_SECONDS ?= 60

# Two compilations at a time: the program and its tests.
MAKEFLAGS += --jobs=2

all: nsqd

nsqd: main.cpp nsqd.hpp Makefile
	$(CXX) $(CXXFLAGS) $(OPT) main.cpp -o $@

# Starts a daemon that only this machine can reach; its data is in .data.
run: nsqd
	@mkdir -p .data
	@echo "Clients: 127.0.0.1:4150   HTTP, and a page for your browser: http://127.0.0.1:4151/"
	@echo "Try:     curl -d hello 'http://127.0.0.1:4151/pub?topic=clicks'     Ctrl-C ends it; what is queued stays in .data"
	@./nsqd --tcp-address=127.0.0.1:4150 --http-address=127.0.0.1:4151 --data-path=.data

# A second unit with the header and nothing else, so that a forgotten `inline` fails the link.
$(BUILD)/test: test.cpp nsqd.hpp Makefile
	@mkdir -p $(BUILD)
	echo '#include "nsqd.hpp"' | $(CXX) $(CXXFLAGS) $(TEST_OPT) -x c++ -c - -o $(BUILD)/second.o
	$(CXX) $(CXXFLAGS) $(TEST_OPT) test.cpp $(BUILD)/second.o -o $@

# The program that the README shows, as it stands there.
$(BUILD)/example: README.md nsqd.hpp Makefile
	@mkdir -p $(BUILD)
	sed -n '/^```cpp$$/,/^```$$/p' README.md | sed '/^```/d' >$(BUILD)/example.cpp
	$(CXX) $(CXXFLAGS) $(TEST_OPT) $(BUILD)/example.cpp -o $@

test: nsqd $(BUILD)/test $(BUILD)/example
	$(BUILD)/example
	NSQD_BIN=./nsqd $(BUILD)/test

# How fast it is, in under three minutes. `.build/bench/test bench --help` tells what else it can measure.
bench:
	@$(MAKE) -s -j2 BUILD=$(BUILD)/bench TEST_OPT=-O2 nsqd $(BUILD)/bench/test
	$(BUILD)/bench/test bench --bin ./nsqd

# Looks for input that breaks something, for FUZZ_SECONDS at each target, with clang's libFuzzer. What it finds is in .build/fuzz.
fuzz:
	@mkdir -p $(BUILD)/fuzz/corpus
	clang++ $(CXXFLAGS) -O1 -g -DNSQD_FUZZ -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined test.cpp -o $(BUILD)/fuzz/test
	@$(BUILD)/fuzz/test $(BUILD)/fuzz/corpus >$(BUILD)/fuzz/targets
	@while read name longest; do echo "== $$name"; \
	  FUZZ=$$name $(BUILD)/fuzz/test -max_len=$$longest -max_total_time=$(FUZZ_SECONDS) -timeout=10 -entropic=0 -print_final_stats=1 \
	    -verbosity=0 -artifact_prefix=$(BUILD)/fuzz/$$name- $(BUILD)/fuzz/corpus/$$name || exit 1; \
	done <$(BUILD)/fuzz/targets

install: nsqd
	install -D -m 755 nsqd $(DESTDIR)$(PREFIX)/bin/nsqd
	install -D -m 644 nsqd.hpp $(DESTDIR)$(PREFIX)/include/nsqd.hpp

clean:
	rm -rf nsqd $(BUILD)

.PHONY: all run test bench fuzz install clean
