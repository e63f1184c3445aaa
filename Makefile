# nsqd: one header, one program. `make run` starts it on loopback, `make test` builds and tests it.

CXX      ?= g++
STD      ?= c++17
OPT      ?= -O2 -g
CXXFLAGS ?= -std=$(STD) $(OPT) -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror
PREFIX   ?= /usr/local
BUILD    ?= .build

all: nsqd

nsqd: main.cpp nsqd.hpp
	$(CXX) $(CXXFLAGS) -pthread main.cpp -o $@

# Starts a daemon that only this machine can reach; its data is in .data.
run: nsqd
	mkdir -p .data
	./nsqd --tcp-address=127.0.0.1:4150 --http-address=127.0.0.1:4151 --data-path=.data

# A second unit that includes the header, so that a forgotten `inline` fails the link.
$(BUILD)/test: test.cpp nsqd.hpp
	mkdir -p $(BUILD)
	echo '#include "nsqd.hpp"' | $(CXX) $(CXXFLAGS) -pthread -I. -x c++ -c - -o $(BUILD)/second.o
	$(CXX) $(CXXFLAGS) -pthread test.cpp $(BUILD)/second.o -o $@

test: nsqd $(BUILD)/test
	NSQD_BIN=./nsqd $(BUILD)/test

install: nsqd
	install -D -m 755 nsqd $(DESTDIR)$(PREFIX)/bin/nsqd
	install -D -m 644 nsqd.hpp $(DESTDIR)$(PREFIX)/include/nsqd.hpp

clean:
	rm -rf nsqd $(BUILD)

.PHONY: all run test install clean
