// Tests of nsqd.hpp and of the program that main.cpp makes of it: real sockets, real files, real signals.
//
//   .build/test           all of them                      NSQD_BIN        the program to test (default: ./nsqd)
//   .build/test word …    those whose name has the word    TEST_JOBS       how many run at a time (default 4)
//                                                          TEST_PATIENCE   a factor for all time limits (default 1)
//                                                          KILL_ROUNDS     rounds of each kill test (default 3)
//                                                          LOAD_SECONDS    of the load test (default 2); no test may take
//                                                                          more than a minute times TEST_PATIENCE
//                                                          TEST_KEEP       if set, what tests have written stays
//
// Each test is a process of its own, with a folder of its own and a time limit: a crash fails one test. Nothing waits for
// a fixed time, all wait for a condition. What nsqd 1.3.0 answers word for word is checked elsewhere; here is what a
// user relies on.

#include "nsqd.hpp"

#include <arpa/inet.h>
#include <ftw.h>
#include <netdb.h>
#include <dirent.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#endif

#include <algorithm>
#include <climits>
#include <csignal>
#include <ctime>
#include <atomic>
#include <cctype>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <unordered_set>
#include <utility>
#include <vector>

namespace {

// =====================================================================================================================
// Framework
// =====================================================================================================================

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
using Strings = std::vector<std::string>;

struct Failed : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct Skipped : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Test {
  const char* name;
  void (*body)();
};
std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
struct Register {
  Register(const char* name, void (*body)()) { tests().push_back({name, body}); }
};
#define TEST(name)                             \
  void name();                                 \
  const Register register_##name(#name, name); \
  void name()

[[noreturn]] void fail(int line, const std::string& what) {
  throw Failed("test.cpp:" + std::to_string(line) + ": " + what);
}

// A value as it is shown in a failure: texts in quotes, with their odd bytes as \xNN, and cut where they get long.
std::string show(std::string_view text) {
  std::string out = "\"";
  for (const char c : text.substr(0, 400)) {
    char hex[8];
    std::snprintf(hex, sizeof hex, "\\x%02x", static_cast<unsigned char>(c));
    out += c >= ' ' && c <= '~' ? std::string(1, c) : c == '\n' ? "\\n" : hex;
  }
  return out + (text.size() > 400 ? "\" … " + std::to_string(text.size()) + " bytes" : "\"");
}
template <class T>
std::string show(const T& value) {
  if constexpr (std::is_convertible_v<T, std::string_view>) return show(std::string_view(value));
  else if constexpr (std::is_arithmetic_v<T>) return std::to_string(value);
  else {
    std::string out = "[" + std::to_string(value.size()) + "]";
    for (const auto& item : value) out += out.size() < 1000 ? " " + show(item) : "";
    return out;
  }
}
template <class A, class B>
bool same(const A& a, const B& b) {
  if constexpr (std::is_integral_v<A> && std::is_integral_v<B>)
    return static_cast<int64_t>(a) == static_cast<int64_t>(b);
  else return a == b;
}
template <class A, class B>
void check_eq(const A& a, const B& b, const char* text, int line) {
  if (!same(a, b)) fail(line, std::string(text) + "\n    left:  " + show(a) + "\n    right: " + show(b));
}
#define CHECK(condition) ((condition) ? void() : fail(__LINE__, "not so: " #condition))
#define CHECK_EQ(a, b) check_eq(a, b, #a " == " #b, __LINE__)
#define CHECK_HAS(text, part) \
  (std::string(text).find(part) != std::string::npos ? void() : fail(__LINE__, show(part) + " is not in " + show(text)))
#define CHECK_THROWS(type, statement)                                      \
  do {                                                                     \
    bool thrown_ = false;                                                  \
    try {                                                                  \
      statement;                                                           \
    } catch (const type&) {                                                \
      thrown_ = true;                                                      \
    }                                                                      \
    if (!thrown_) fail(__LINE__, "does not throw " #type ": " #statement); \
  } while (false)

double number_from_environment(const char* name, double otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? std::atof(value) : otherwise;
}

// How long a condition may take to come true. Only a failing test ever waits that long.
std::chrono::milliseconds patience() {
  return std::chrono::milliseconds(static_cast<int64_t>(20000 * number_from_environment("TEST_PATIENCE", 1)));
}
template <class Condition>
void eventually(Condition condition, const char* text, int line) {
  const auto end = Clock::now() + patience();
  while (!condition()) {
    if (Clock::now() > end) fail(line, std::string("never came true: ") + text);
    std::this_thread::sleep_for(2ms);
  }
}
#define EVENTUALLY(condition) eventually([&] { return (condition); }, #condition, __LINE__)

std::string g_folder;   // of the running test
std::string g_self;     // this program, as it was called
std::string g_program;  // the daemon's path

std::string folder(const std::string& name) {
  std::filesystem::create_directories(g_folder + "/" + name);
  return g_folder + "/" + name;
}

std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

// Whether a sanitizer has complained in a daemon of this test; its log is shown.
bool sanitizer_complains() {
  for (const auto& file : std::filesystem::directory_iterator(g_folder)) {
    if (file.path().filename().string().rfind("log.", 0) != 0) continue;
    const std::string log = read_file(file.path().string());
    if (log.find("Sanitizer") == std::string::npos && log.find("runtime error:") == std::string::npos) continue;
    std::fprintf(stderr, "%s\n", log.c_str());
    return true;
  }
  return false;
}

// In the child: the test, with its words on standard error. 0 passed, 1 failed, 77 skipped.
int run_here(const Test& test) {
  try {
    test.body();
    return sanitizer_complains() ? 1 : 0;
  } catch (const Skipped& reason) {
    std::fprintf(stderr, "%s\n", reason.what());
    return 77;
  } catch (const std::exception& failure) {
    std::fprintf(stderr, "%s\n", failure.what());
    return 1;
  }
}

struct Running {
  const Test* test;
  pid_t pid;
  std::string folder;
  Clock::time_point started;
};

Running launch(const Test& test, const std::string& base) {
  Running run{&test, 0, base + "/" + test.name, Clock::now()};
  std::filesystem::create_directories(run.folder);
  std::fflush(nullptr);
  run.pid = fork();
  if (run.pid != 0) return run;
  setpgid(0, 0);  // so that one kill ends the test and every daemon that it started
#ifdef __linux__
  prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
  const int output = open((run.folder + "/output").c_str(), O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0600);
  dup2(output, STDOUT_FILENO);
  dup2(output, STDERR_FILENO);
  g_folder = run.folder;
  std::exit(run_here(test));
}

// After the end of a test's process: says how it went, removes what it left. 0 passed, 1 failed, 77 skipped.
int finish(const Running& run, int wait_status) {
  kill(-run.pid, SIGKILL);
  const double seconds = std::chrono::duration<double>(Clock::now() - run.started).count();
  const int status = WIFEXITED(wait_status) ? WEXITSTATUS(wait_status) : 1;
  const std::string output = read_file(run.folder + "/output");
  std::printf("%s %s (%.2f s)\n", status == 0 ? "ok  " : status == 77 ? "skip" : "FAIL", run.test->name, seconds);
  if (status != 0) std::printf("%s", output.c_str());
  if (WIFSIGNALED(wait_status)) std::printf("  ended by signal %d\n", WTERMSIG(wait_status));
  if (status != 0 && status != 77) std::printf("  again: %s %s\n", g_self.c_str(), run.test->name);
  std::fflush(stdout);
  std::error_code ignored;
  if (std::getenv("TEST_KEEP") == nullptr) std::filesystem::remove_all(run.folder, ignored);
  return status;
}

[[maybe_unused]] int run_all(const std::vector<const Test*>& chosen) {
  const char* root = std::getenv("TMPDIR");
  std::string base = std::string(root != nullptr ? root : "/tmp") + "/nsqd-test.XXXXXX";
  if (mkdtemp(base.data()) == nullptr) return std::perror(base.c_str()), 1;
  const size_t jobs = static_cast<size_t>(std::max(1.0, number_from_environment("TEST_JOBS", 4)));
  std::vector<Running> running;
  std::map<int, int> count;
  for (size_t next = 0; next < chosen.size() || !running.empty();) {
    while (running.size() < jobs && next < chosen.size()) running.push_back(launch(*chosen[next++], base));
    for (size_t i = 0; i < running.size();) {
      int status = 0;
      if (Clock::now() > running[i].started + 3 * patience()) kill(running[i].pid, SIGKILL);
      if (waitpid(running[i].pid, &status, WNOHANG) != running[i].pid) {
        i++;
        continue;
      }
      const int result = finish(running[i], status);
      count[result == 0 || result == 77 ? result : 1]++;
      running.erase(running.begin() + static_cast<std::ptrdiff_t>(i));
    }
    std::this_thread::sleep_for(2ms);
  }
  std::error_code ignored;
  if (std::getenv("TEST_KEEP") == nullptr) std::filesystem::remove_all(base, ignored);
  std::printf("%d passed, %d failed", count[0], count[1]);
  if (count[77] != 0) std::printf(", %d skipped", count[77]);
  std::printf("\n");
  return count[1] == 0 && count[0] + count[77] != 0 ? 0 : 1;
}

// =====================================================================================================================
// Helpers
// =====================================================================================================================

// ---- Files

bool exists(const std::string& path) { return std::filesystem::exists(path); }

void write_file(const std::string& path, std::string_view content) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(content.data(), static_cast<std::streamsize>(content.size()));
  out.close();
  if (!out) fail(__LINE__, "cannot write " + path);
}

// The names in a folder, sorted; only those that contain `part`.
Strings files(const std::string& path, const std::string& part = "") {
  Strings out;
  for (const auto& entry : std::filesystem::directory_iterator(path)) {
    const std::string name = entry.path().filename().string();
    if (name.find(part) != std::string::npos) out.push_back(name);
  }
  std::sort(out.begin(), out.end());
  return out;
}

std::string copy_of(const std::string& path, const std::string& name) {
  const std::string to = g_folder + "/" + name;
  std::filesystem::remove_all(to);
  std::filesystem::copy(path, to, std::filesystem::copy_options::recursive);
  return to;
}

// ---- Sockets

std::string be(uint64_t value, int bytes) {
  std::string out;
  for (int i = bytes - 1; i >= 0; i--) out += static_cast<char>(value >> (8 * i) & 0xff);
  return out;
}
std::string be32(size_t value) { return be(value, 4); }
uint64_t from_be(std::string_view bytes) {
  uint64_t value = 0;
  for (const char c : bytes) value = value << 8 | static_cast<unsigned char>(c);
  return value;
}

// A stream socket with a buffer of what it has read. All waits end after patience() with a failure.
class Socket {
 public:
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)), in_(std::move(other.in_)), head_(other.head_) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    in_.swap(other.in_);
    std::swap(head_, other.head_);
    return *this;
  }
  ~Socket() { close(); }

  void close() {
    if (fd_ >= 0) ::close(std::exchange(fd_, -1));
  }
  void reset() {  // closes with RST instead of FIN
    const linger now{1, 0};
    setsockopt(fd_, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close();
  }
  bool connected(const sockaddr* address, socklen_t size) const { return ::connect(fd_, address, size) == 0; }
  void half_close() const { shutdown(fd_, SHUT_WR); }

  // Sends all, or what goes in within the time; returns how much that was.
  size_t try_send(std::string_view bytes, std::chrono::milliseconds limit) const {
    size_t sent = 0;
    while (sent < bytes.size() && wait(POLLOUT, limit)) {
      const ssize_t n = ::send(fd_, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n < 0 && errno != EAGAIN && errno != EINTR) break;
      if (n > 0) sent += static_cast<size_t>(n);
    }
    return sent;
  }
  void send(std::string_view bytes, int line = __builtin_LINE()) const {
    if (try_send(bytes, patience()) != bytes.size()) fail(line, "the connection takes no more");
  }

  // Makes at least `n` bytes readable; false when none come within the time. Fails when the other side closed.
  bool have(size_t n, std::chrono::milliseconds limit, int line) {
    while (buffered() < n) {
      const int more = fill(limit);
      if (more == 0) fail(line, "closed by the other side, after " + show(peek(0, buffered())));
      if (more < 0) return false;
    }
    return true;
  }
  std::string take(size_t n, int line = __builtin_LINE()) {
    if (!have(n, patience(), line))
      fail(line, "wanted " + std::to_string(n) + " bytes, only got " + show(peek(0, buffered())));
    std::string out(peek(0, n));
    drop(n);
    return out;
  }
  std::string take_line(int line = __builtin_LINE()) {
    size_t end;
    while ((end = in_.find('\n', head_)) == std::string::npos) {
      if (!have(buffered() + 1, patience(), line)) fail(line, "wanted a line, only got " + show(peek(0, buffered())));
    }
    return take(end + 1 - head_);
  }
  // All until the other side closes.
  std::string take_rest(int line = __builtin_LINE()) {
    int more;
    while ((more = fill(patience())) > 0) continue;
    if (more < 0) fail(line, "was not closed, after " + show(peek(0, buffered())));
    return take(buffered());
  }
  bool closed() { return take_rest().empty(); }

 protected:
  bool wait(short events, std::chrono::milliseconds limit) const {
    pollfd p{fd_, events, 0};
    return poll(&p, 1, static_cast<int>(limit.count())) == 1;
  }
  // Reads what is there: the number of bytes, 0 at the end (also by a reset), -1 when nothing came within the time.
  int fill(std::chrono::milliseconds limit) {
    if (!wait(POLLIN, limit)) return -1;
    char buffer[65536];
    const ssize_t n = recv(fd_, buffer, sizeof buffer, 0);
    if (n > 0) in_.append(buffer, static_cast<size_t>(n));
    return n > 0 ? static_cast<int>(n) : 0;
  }
  size_t buffered() const { return in_.size() - head_; }
  std::string_view peek(size_t at, size_t n) const { return std::string_view(in_).substr(head_ + at, n); }
  void drop(size_t n) {
    head_ += n;
    if (head_ > in_.size() / 2) in_.erase(0, std::exchange(head_, 0));
  }

 private:
  int fd_;
  std::string in_;
  size_t head_ = 0;  // what is before it was taken already
};

sockaddr_in loopback(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

int connect_to(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const sockaddr_in address = loopback(port);
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) return fd;
  ::close(fd);
  throw Failed("cannot connect to port " + std::to_string(port));
}

int connect_to(const std::string& path) {
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
  if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) return fd;
  ::close(fd);
  throw Failed("cannot connect to " + path);
}

// A server's end: TCP to play an nsqlookupd or an auth server, UDP to play statsd.
class Listener {
 public:
  explicit Listener(int type = SOCK_STREAM) : fd_(socket(AF_INET, type | SOCK_CLOEXEC, 0)) {
    sockaddr_in address = loopback(0);
    socklen_t size = sizeof address;
    if (bind(fd_, reinterpret_cast<sockaddr*>(&address), size) != 0) fail(__LINE__, "cannot bind");
    if (type == SOCK_STREAM && listen(fd_, 16) != 0) fail(__LINE__, "cannot listen");
    getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &size);
    port = ntohs(address.sin_port);
  }
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;
  ~Listener() { ::close(fd_); }
  bool knocked(std::chrono::milliseconds limit) const {
    pollfd p{fd_, POLLIN, 0};
    return poll(&p, 1, static_cast<int>(limit.count())) == 1;
  }
  Socket accept(int line = __builtin_LINE()) const {
    if (!knocked(patience())) fail(line, "nobody connected");
    return Socket(::accept(fd_, nullptr, nullptr));
  }
  std::string packet(int line = __builtin_LINE()) const {
    if (!knocked(patience())) fail(line, "no packet came");
    char buffer[65536];
    const ssize_t n = recv(fd_, buffer, sizeof buffer, 0);
    return {buffer, static_cast<size_t>(std::max<ssize_t>(n, 0))};
  }
  std::string address() const { return "127.0.0.1:" + std::to_string(port); }
  int port = 0;

 private:
  int fd_;
};

// ---- Daemons: another process, or inside this one

struct Ports {
  int tcp = 0, http = 0;
};

struct Ended {
  int status;
  std::string out, err;
};

using Limits = std::vector<std::pair<int, rlim_t>>;  // RLIMIT_…, value

// Starts the program with standard output and error in files.
pid_t spawn(const Strings& arguments, const std::string& out, const std::string& err, const Limits& limits = {}) {
  std::vector<char*> argv{const_cast<char*>(g_program.c_str())};
  for (const auto& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  const int to_out = open(out.c_str(), O_CREAT | O_WRONLY | O_TRUNC | O_CLOEXEC, 0600);
  const int to_err = open(err.c_str(), O_CREAT | O_WRONLY | O_APPEND | O_TRUNC | O_CLOEXEC, 0600);
  const pid_t pid = fork();
  if (pid != 0) {
    ::close(to_out);
    ::close(to_err);
    return pid;
  }
#ifdef __linux__
  prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
  dup2(to_out, STDOUT_FILENO);
  dup2(to_err, STDERR_FILENO);
  signal(SIGXFSZ, SIG_IGN);  // for RLIMIT_FSIZE: an error, as on a full disk, not the end
  signal(SIGHUP, SIG_DFL);   // also when the tests run under nohup
  for (const auto& [what, value] : limits) {
    const rlimit limit{value, value};
    setrlimit(static_cast<decltype(RLIMIT_NOFILE)>(what), &limit);
  }
  execv(g_program.c_str(), argv.data());
  _exit(127);
}

// Waits for the end: the exit status, or 128 + the signal.
int wait_for(pid_t pid, int line = __builtin_LINE()) {
  int status = 0;
  eventually([&] { return waitpid(pid, &status, WNOHANG) == pid; }, "the daemon ends", line);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// Runs the program to its end.
Ended run_to_end(const Strings& arguments, int line = __builtin_LINE()) {
  const std::string out = g_folder + "/end.out", err = g_folder + "/end.err";
  const pid_t pid = spawn(arguments, out, err);
  const int status = wait_for(pid, line);
  return {status, read_file(out), read_file(err)};
}

// The daemon as a process, listening on free ports once it is constructed.
class Process : public Ports {
 public:
  explicit Process(Strings flags = {}, std::string data = folder("data"), Limits limits = {},
                   int line = __builtin_LINE())
      : data_path(std::move(data)), flags_(std::move(flags)), limits_(std::move(limits)) {
    start(line);
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;
  ~Process() {
    int status = 0;
    if (pid_ > 0) signal(SIGKILL), waitpid(pid_, &status, 0);
    if (std::uncaught_exceptions() == 0) return;
    if (pid_ > 0 && status != SIGKILL) std::fprintf(stderr, "the daemon had ended before: wait status %d\n", status);
    std::fprintf(stderr, "--- the daemon's log\n%s---\n", log().substr(0, 6000).c_str());
  }
  void start(int line = __builtin_LINE()) {
    static int count = 0;
    log_path_ = g_folder + "/log." + std::to_string(count++);
    Strings arguments{"--tcp-address=127.0.0.1:0", "--http-address=127.0.0.1:0", "--data-path=" + data_path,
                      "--broadcast-address=127.0.0.1"};
    arguments.insert(arguments.end(), flags_.begin(), flags_.end());
    pid_ = spawn(arguments, g_folder + "/out", log_path_, limits_);
    eventually([&] { return listens(); }, "the daemon listens", line);
  }
  void signal(int number) const { kill(pid_, number); }
  int wait(int line = __builtin_LINE()) { return wait_for(std::exchange(pid_, 0), line); }
  int stop(int line = __builtin_LINE()) { return signal(SIGTERM), wait(line); }
  void kill9() { signal(SIGKILL), wait(); }
  void restart(int with = SIGKILL, int line = __builtin_LINE()) { signal(with), wait(line), start(line); }
  std::string log() const { return read_file(log_path_); }
  pid_t pid() const { return pid_; }
  void flags(Strings flags) { flags_ = std::move(flags); }
  const std::string data_path;

 private:
  bool listens() {
    int status = 0;
    if (waitpid(pid_, &status, WNOHANG) == pid_) pid_ = 0, throw Failed("the daemon ended at once:\n" + log());
    const std::string text = log();
    tcp = port_of(text, "TCP: listening on ");
    http = port_of(text, "HTTP: listening on ");
    return tcp != 0 && http != 0;
  }
  // The port in the log line; 0 while there is none, -1 for a Unix socket.
  static int port_of(const std::string& text, const std::string& words) {
    const size_t at = text.find(" " + words), end = text.find('\n', at);
    if (at == std::string::npos || end == std::string::npos) return 0;
    const std::string address = text.substr(at + words.size() + 1, end - at - words.size() - 1);
    return address[0] == '/' ? -1 : std::atoi(address.substr(address.rfind(':') + 1).c_str());
  }

  Strings flags_;
  Limits limits_;
  std::string log_path_;
  pid_t pid_ = 0;
};

// Lines that a daemon in this process logs.
struct Log {
  std::mutex mutex;
  std::string text;
  std::string all() {
    const std::lock_guard<std::mutex> lock(mutex);
    return text;
  }
};

// Options for a daemon in this process: no files without a data path, and its log goes to the output of the test.
nsqd::Options local_options(const std::string& data = "") {
  nsqd::Options options;
  options.tcp_address = options.http_address = "127.0.0.1:0";
  options.broadcast_address = "127.0.0.1";
  options.data_path = data;
  options.mem_only = data.empty();
  options.log_level = nsqd::Level::kWarning;
  return options;
}

// A daemon in this process, started.
class Local : public Ports {
 public:
  explicit Local(nsqd::Options options = local_options())
      : daemon_(std::make_unique<nsqd::Daemon>(std::move(options))) {
    daemon_->start();
    tcp = daemon_->tcp_port();
    http = daemon_->http_port();
  }
  explicit Local(const std::string& data) : Local(local_options(data)) {}
  nsqd::Daemon* operator->() const { return daemon_.get(); }
  nsqd::Daemon& operator*() const { return *daemon_; }

 private:
  std::unique_ptr<nsqd::Daemon> daemon_;
};

// ---- Clients

struct Frame {
  int type;  // 0 response, 1 error, 2 message
  std::string data;
};

struct Message {
  int64_t timestamp;
  int attempts;
  std::string id, body;
};

// A client of the TCP protocol. Heartbeats are answered and never seen, but with raw_frame.
class Client : public Socket {
 public:
  explicit Client(const Ports& daemon) : Socket(connect_to(daemon.tcp)) { send("  V2"); }
  explicit Client(const std::string& path) : Socket(connect_to(path)) { send("  V2"); }

  void command(const std::string& line) const { send(line + "\n"); }
  void command(const std::string& line, const std::string& body) const { send(line + "\n" + be32(body.size()) + body); }

  std::optional<Frame> raw_frame(std::chrono::milliseconds limit, int line) {
    if (!have(4, limit, line)) return {};
    const size_t size = from_be(peek(0, 4));
    if (!have(4 + size, patience(), line)) fail(line, "half a frame");
    Frame frame{static_cast<int>(from_be(peek(4, 4))), std::string(peek(8, size - 4))};
    drop(4 + size);
    return frame;
  }
  std::optional<Frame> frame(std::chrono::milliseconds limit = patience(), int line = __builtin_LINE()) {
    auto frame = raw_frame(limit, line);
    while (frame && frame->type == 0 && frame->data == "_heartbeat_") {
      command("NOP");
      frame = raw_frame(limit, line);
    }
    return frame;
  }
  // The next frame is this response.
  void expect(const std::string& response, int line = __builtin_LINE()) {
    const auto next = frame(patience(), line);
    if (!next || next->type != 0 || next->data != response)
      fail(line, "wanted " + show(response) + ", got " + text(next));
  }
  // The next frame is an error that begins with this.
  void expect_error(const std::string& start, int line = __builtin_LINE()) {
    const auto next = frame(patience(), line);
    if (!next || next->type != 1 || next->data.rfind(start, 0) != 0)
      fail(line, "wanted " + show(start) + ", got " + text(next));
  }
  // The next frame is a message.
  Message message(int line = __builtin_LINE()) {
    const auto next = frame(patience(), line);
    if (!next || next->type != 2) fail(line, "wanted a message, got " + text(next));
    return parse(next->data);
  }
  std::optional<Message> try_message(std::chrono::milliseconds limit, int line = __builtin_LINE()) {
    const auto next = frame(limit, line);
    if (next && next->type != 2) fail(line, "wanted a message, got " + text(next));
    return next ? std::optional<Message>(parse(next->data)) : std::nullopt;
  }
  void nothing(std::chrono::milliseconds limit, int line = __builtin_LINE()) {
    const auto next = frame(limit, line);
    if (next) fail(line, "wanted nothing, got " + text(next));
  }
  static Message parse(const std::string& data) {
    return {static_cast<int64_t>(from_be(data.substr(0, 8))), static_cast<int>(from_be(data.substr(8, 2))),
            data.substr(10, 16), data.substr(26)};
  }

  void pub(const std::string& topic, const std::string& body, int line = __builtin_LINE()) {
    command("PUB " + topic, body);
    expect("OK", line);
  }
  void dpub(const std::string& topic, int ms, const std::string& body, int line = __builtin_LINE()) {
    command("DPUB " + topic + " " + std::to_string(ms), body);
    expect("OK", line);
  }
  void mpub(const std::string& topic, const Strings& bodies, int line = __builtin_LINE()) {
    std::string all = be32(bodies.size());
    for (const auto& body : bodies) all += be32(body.size()) + body;
    command("MPUB " + topic, all);
    expect("OK", line);
  }
  void identify(const std::string& json, int line = __builtin_LINE()) {
    command("IDENTIFY", json);
    expect("OK", line);
  }
  void sub(const std::string& topic, const std::string& channel, int ready = 1, int line = __builtin_LINE()) {
    command("SUB " + topic + " " + channel);
    expect("OK", line);
    if (ready > 0) command("RDY " + std::to_string(ready));
  }
  void fin(const Message& message) const { command("FIN " + message.id); }
  void req(const Message& message, int ms) const { command("REQ " + message.id + " " + std::to_string(ms)); }
  void touch(const Message& message) const { command("TOUCH " + message.id); }

 private:
  static std::string text(const std::optional<Frame>& frame) {
    return frame ? "type " + std::to_string(frame->type) + " " + show(frame->data) : "nothing";
  }
};

struct Reply {
  int status = 0;
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;
};

// An HTTP connection.
class Http : public Socket {
 public:
  explicit Http(const Ports& daemon) : Socket(connect_to(daemon.http)) {}

  void request(const std::string& method, const std::string& target, const std::string& body = "",
               const std::string& headers = "") const {
    send(method + " " + target + " HTTP/1.1\r\nHost: localhost\r\n" + headers +
         (method == "GET" ? "" : "Content-Length: " + std::to_string(body.size()) + "\r\n") + "\r\n" + body);
  }
  Reply reply(int line = __builtin_LINE()) {
    Reply reply;
    const std::string first = take_line(line);
    if (first.rfind("HTTP/1.1 ", 0) != 0) fail(line, "no HTTP: " + show(first));
    reply.status = std::atoi(first.c_str() + 9);
    for (std::string header; (header = take_line(line)) != "\r\n";) {
      const size_t colon = header.find(':');
      std::string name = header.substr(0, colon);
      for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
      reply.headers[name] = header.substr(colon + 2, header.size() - colon - 4);
    }
    if (reply.headers["transfer-encoding"] == "chunked") {
      while (const size_t size = std::stoul(take_line(line), nullptr, 16))
        reply.body += take(size + 2, line).substr(0, size);
      take_line(line);
    } else {
      reply.body = take(static_cast<size_t>(std::atoi(reply.headers["content-length"].c_str())), line);
    }
    return reply;
  }
};

Reply http(const Ports& daemon, const std::string& method, const std::string& target, const std::string& body = "",
           const std::string& headers = "", int line = __builtin_LINE()) {
  Http connection(daemon);
  connection.request(method, target, body, headers);
  return connection.reply(line);
}
// Those that have to succeed.
std::string get(const Ports& daemon, const std::string& target, int line = __builtin_LINE()) {
  const Reply reply = http(daemon, "GET", target, "", "", line);
  if (reply.status != 200) fail(line, target + " says " + std::to_string(reply.status) + " " + reply.body);
  return reply.body;
}
std::string post(const Ports& daemon, const std::string& target, const std::string& body = "",
                 int line = __builtin_LINE()) {
  const Reply reply = http(daemon, "POST", target, body, "", line);
  if (reply.status != 200) fail(line, target + " says " + std::to_string(reply.status) + " " + reply.body);
  return reply.body;
}
std::string escaped(std::string name) {
  if (const size_t at = name.find('#'); at != std::string::npos) name.replace(at, 1, "%23");
  return name;
}
void create_channel(const Ports& daemon, const std::string& topic, const std::string& channel,
                    int line = __builtin_LINE()) {
  post(daemon, "/topic/create?topic=" + escaped(topic), "", line);
  post(daemon, "/channel/create?topic=" + escaped(topic) + "&channel=" + escaped(channel), "", line);
}

std::string stats_of(const Ports& daemon, const std::string& topic) {
  return get(daemon, "/stats?format=json&include_clients=false&include_mem=false&topic=" + escaped(topic));
}

// A number of a topic or channel in /stats; -1 where it is not there.
int64_t number_at(const std::string& json, const std::string& key, size_t from) {
  const size_t at = from == std::string::npos ? from : json.find("\"" + key + "\":", from);
  return at == std::string::npos ? -1 : std::atoll(json.c_str() + at + key.size() + 3);
}
int64_t channel_count(const Ports& daemon, const std::string& topic, const std::string& channel,
                      const std::string& key) {
  const std::string json = stats_of(daemon, topic);
  return number_at(json, key, json.find("\"channel_name\":\"" + channel + "\""));
}
int64_t topic_count(const Ports& daemon, const std::string& topic, const std::string& key) {  // its own come last
  const std::string json = stats_of(daemon, topic);
  return number_at(json, key, json.rfind("\"" + key + "\":"));
}

// Consumes and finishes all that a channel has, deferred ones too.
std::vector<Message> drain(const Ports& daemon, const std::string& topic, const std::string& channel,
                           int line = __builtin_LINE()) {
  Client consumer(daemon);
  consumer.identify("{\"msg_timeout\":60000}", line);
  consumer.sub(topic, channel, 2500, line);
  std::vector<Message> out;
  std::string fins;
  for (const auto end = Clock::now() + 2 * patience(); Clock::now() < end;) {
    auto message = consumer.try_message(fins.empty() ? 20ms : 0ms, line);
    if (message) {
      fins += "FIN " + message->id + "\n";
      out.push_back(std::move(*message));
    }
    if (!message || fins.size() > 4000) consumer.send(std::exchange(fins, ""));
    if (message || !fins.empty()) continue;
    int64_t left = 0;
    for (const char* key : {"depth", "in_flight_count", "deferred_count"})
      left += channel_count(daemon, topic, channel, key);
    if (left == 0) return out;
  }
  fail(line, topic + ":" + channel + " never gets empty");
}

Strings bodies_of(const std::vector<Message>& messages) {
  Strings out;
  for (const auto& message : messages) out.push_back(message.body);
  return out;
}
Strings sorted(Strings items) {
  std::sort(items.begin(), items.end());
  return items;
}
Strings numbered(const std::string& prefix, int from, int to) {
  Strings out;
  for (int i = from; i < to; i++) out.push_back(prefix + std::to_string(i));
  return out;
}
std::set<std::string> set_of(const Strings& items) { return {items.begin(), items.end()}; }

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::system_clock::now().time_since_epoch())
      .count();
}
int64_t ms_since(Clock::time_point start) {
  return std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - start).count();
}

// A number from /proc/<pid>/status; -1 where there is none.
int64_t proc_status(pid_t pid, const std::string& key) {
  const std::string text = read_file("/proc/" + std::to_string(pid) + "/status");
  const size_t at = text.find("\n" + key + ":");
  return at == std::string::npos ? -1 : std::atoll(text.c_str() + at + key.size() + 2);
}

// Memory of its own that the daemon uses, in kB; 0 where that cannot be told, as under a sanitizer, which has its own.
int64_t memory_kb(const Process& d) {
  return proc_status(d.pid(), "VmSize") > int64_t{1} << 30 ? 0 : std::max<int64_t>(proc_status(d.pid(), "RssAnon"), 0);
}
void needs_memory_figures(const Process& d) {
  if (memory_kb(d) == 0) throw Skipped("what memory the daemon uses cannot be told here");
}

// =====================================================================================================================
// Service and signals
// =====================================================================================================================

// A service that writes down what is done with it. Its parts can be replaced.
struct Diary : nsqd::Service {
  std::string text;
  nsqd::Environment environment;
  std::function<void()> on_init = [] {}, on_start = [] {}, on_stop = [] {};
  void init(const nsqd::Environment& given) override {
    environment = given;
    text += "init ";
    on_init();
  }
  void start() override {
    text += "start ";
    on_start();
  }
  int stop() override {
    text += "stop";
    on_stop();
    return 7;
  }
};

int run_service(nsqd::Service& service) {
  static const char* const arguments[] = {"service", "--flag", nullptr};
  return nsqd::run(service, 2, arguments);
}

TEST(run_does_init_start_and_stop_and_returns_what_stop_returned) {
  Diary diary;
  diary.on_start = [] { kill(getpid(), SIGTERM); };
  CHECK_EQ(run_service(diary), 7);
  CHECK_EQ(diary.text, "init start stop");
  CHECK_EQ(diary.environment.argc, 2);
  CHECK_EQ(std::string(diary.environment.argv[1]), "--flag");
}

TEST(a_signal_that_comes_during_init_is_not_lost) {
  Diary diary;
  diary.on_init = [] { kill(getpid(), SIGINT); };
  CHECK_EQ(run_service(diary), 7);
  CHECK_EQ(diary.text, "init start stop");
}

TEST(a_second_signal_changes_nothing) {
  Diary diary;
  diary.on_start = [] { kill(getpid(), SIGTERM); };
  diary.on_stop = [] {
    kill(getpid(), SIGTERM);
    kill(getpid(), SIGINT);
  };
  CHECK_EQ(run_service(diary), 7);
  kill(getpid(), SIGINT);
  CHECK_EQ(diary.text, "init start stop");
}

TEST(a_service_can_end_itself_from_any_thread_and_more_than_once) {
  Diary diary;
  std::vector<std::thread> threads;
  diary.on_start = [&] {
    for (int i = 0; i < 4; i++) threads.emplace_back(diary.environment.end);
  };
  CHECK_EQ(run_service(diary), 7);
  for (auto& thread : threads) thread.join();
  diary.environment.end();
}

TEST(run_waits_for_the_signals_that_it_is_told) {
  Diary diary;
  diary.on_start = [] { kill(getpid(), SIGUSR1); };
  const char* const arguments[] = {"service", nullptr};
  CHECK_EQ(nsqd::run(diary, 1, arguments, {SIGUSR1, SIGUSR2}), 7);
}

TEST(an_init_or_start_that_throws_gives_a_status_that_is_not_0) {
  Diary init;
  init.on_init = [] { throw std::runtime_error("no room in the inn"); };
  CHECK(run_service(init) != 0);
  CHECK_EQ(init.text, "init ");
  CHECK_HAS(read_file(g_folder + "/output"), "no room in the inn");
  Diary start;
  start.on_start = [] { throw std::runtime_error("no oil in the lamp"); };
  CHECK(run_service(start) != 0);
  CHECK_HAS(read_file(g_folder + "/output"), "no oil in the lamp");
  Diary early;
  early.on_init = [] { throw nsqd::EarlyExit(3, "as you wish"); };
  CHECK_EQ(run_service(early), 3);
}

TEST(sigterm_and_sigint_end_it_with_status_0_step_by_step) {
  for (const int number : {SIGTERM, SIGINT}) {
    Process d;
    create_channel(d, "t", "c");
    Client(d).pub("t", "x");
    d.signal(number);
    CHECK_EQ(d.wait(), 0);
    const std::string log = d.log();
    size_t at = 0;
    for (const char* step : {"TCP: closing 127.0.0.1:", "NSQ: persisting topic/channel metadata to",
                             "NSQ: closing topics", "TOPIC(t): closing", "CHANNEL(c): closing", "NSQ: bye"}) {
      if ((at = log.find(step, at)) == std::string::npos)
        fail(__LINE__, std::string(step) + " does not follow in " + log);
    }
  }
}

TEST(it_ends_within_a_second_whatever_its_clients_do) {
  Process d({"--msg-timeout=60s"});
  const Socket silent(connect_to(d.tcp)), half_magic(connect_to(d.tcp)), http_silent(connect_to(d.http));
  half_magic.send("  ");
  Client half_command(d), half_body(d), holder(d), waiter(d), unread(d);
  half_command.send("PUB top");
  half_body.send("PUB t\n" + be32(1000) + "half");
  half_body.send("half");
  waiter.sub("t", "c", 100);
  holder.sub("t", "d", 1);
  unread.sub("t", "e", 2500);
  Client(d).mpub("t", Strings(200, std::string(20000, 'x')));
  holder.message();
  Http keep_alive(d), half_request(d);
  keep_alive.request("GET", "/ping");
  CHECK_EQ(keep_alive.reply().status, 200);
  half_request.send("POST /pub?topic=t HTTP/1.1\r\nContent-Length: 100\r\n\r\nhalf");
  const auto start = Clock::now();
  CHECK_EQ(d.stop(), 0);
  CHECK(ms_since(start) < 1000 * patience() / 20000ms);
}

TEST(a_signal_while_it_starts_ends_it_with_status_0) {
  for (int i = 0; i < 5; i++) {
    const pid_t pid =
        spawn({"--tcp-address=127.0.0.1:0", "--http-address=127.0.0.1:0", "--data-path=" + folder("data")},
              g_folder + "/out", g_folder + "/err");
    EVENTUALLY(!read_file(g_folder + "/err").empty());  // its first words: the signals are blocked by now
    kill(pid, SIGTERM);
    CHECK_EQ(wait_for(pid), 0);
  }
}

TEST(after_the_end_its_ports_and_its_data_path_are_free) {
  Process d;
  Client client(d);
  client.pub("t", "x");
  const std::string tcp = std::to_string(d.tcp), http_port = std::to_string(d.http);
  CHECK_EQ(d.stop(), 0);
  d.flags({"--tcp-address=127.0.0.1:" + tcp, "--http-address=127.0.0.1:" + http_port});
  d.start();
  CHECK_EQ(std::to_string(d.tcp), tcp);
  CHECK_EQ(drain(d, "t", "c").size(), 1U);
}

TEST(an_idle_daemon_sleeps) {
  Process d;
  Client consumer(d);
  consumer.sub("t", "c", 10);
  if (proc_status(d.pid(), "voluntary_ctxt_switches") < 0) throw Skipped("no /proc/<pid>/status here");
  const int64_t before = proc_status(d.pid(), "voluntary_ctxt_switches");
  consumer.nothing(2000ms);  // what is measured is a rate, so here the time is given
  CHECK(proc_status(d.pid(), "voluntary_ctxt_switches") - before <= 6);
}

// =====================================================================================================================
// Options and config file
// =====================================================================================================================

nsqd::Options options_of(const Strings& arguments) {
  std::vector<const char*> argv{"nsqd"};
  for (const auto& argument : arguments) argv.push_back(argument.c_str());
  return nsqd::options_from(static_cast<int>(argv.size()), argv.data());
}

// The words of the error that the arguments give; empty when there is none.
std::string refusal(const Strings& arguments) {
  try {
    options_of(arguments);
    return "";
  } catch (const std::exception& error) {
    return error.what();
  }
}

TEST(flags_take_every_form_that_go_flags_have) {
  CHECK_EQ(options_of({"-tcp-address", "1.2.3.4:5"}).tcp_address, "1.2.3.4:5");
  CHECK_EQ(options_of({"--tcp-address=1.2.3.4:5"}).tcp_address, "1.2.3.4:5");
  CHECK_EQ(options_of({"--tcp-address=a:1", "-tcp-address=b:2"}).tcp_address, "b:2");
  CHECK_EQ(options_of({"--mem-queue-size=0x10"}).mem_queue_size, 16);
  CHECK_EQ(options_of({"--sync-every=010"}).sync_every, 8);
  CHECK_EQ(options_of({"--max-msg-size=1_000"}).max_msg_size, 1000);
  CHECK(options_of({"--msg-timeout=1h2m3.5s"}).msg_timeout == std::chrono::milliseconds(3723500));
  CHECK(options_of({"--sync-timeout", "1500us"}).sync_timeout == std::chrono::microseconds(1500));
  CHECK(!options_of({"--statsd-mem-stats=false"}).statsd_mem_stats);
  CHECK(options_of({"--statsd-exclude-ephemeral"}).statsd_exclude_ephemeral);
  CHECK(options_of({"--mem-only"}).mem_only);
  CHECK(options_of({"--log-level=WARN"}).log_level == nsqd::Level::kWarning);
  CHECK_EQ(options_of({"--lookupd-tcp-address=a:1", "--lookupd-tcp-address=b:2"}).lookupd_tcp_address,
           (Strings{"a:1", "b:2"}));
  CHECK_EQ(options_of({"--e2e-processing-latency-percentile=0.5,1.0,0.99"}).e2e_processing_latency_percentile.size(),
           3U);
  CHECK_EQ(options_of({"--max-rdy-count=5", "--", "--max-rdy-count=6"}).max_rdy_count, 5);
}

TEST(a_wrong_flag_is_refused_with_its_name) {
  const std::vector<std::pair<Strings, std::string>> wrong = {
      {{"--no-such-flag"}, "flag provided but not defined: -no-such-flag"},
      {{"--tcp-address"}, "flag needs an argument: -tcp-address"},
      {{"--max-rdy-count=many"}, "invalid value \"many\" for flag -max-rdy-count"},
      {{"--msg-timeout=10"}, "-msg-timeout"},
      {{"--snappy=maybe"}, "invalid boolean value \"maybe\" for -snappy"},
      {{"--log-level=loud"}, "log-level"},
      {{"--=x"}, "bad flag syntax"},
  };
  for (const auto& [arguments, words] : wrong) CHECK_HAS(refusal(arguments), words);
  CHECK_THROWS(nsqd::EarlyExit, options_of({"--no-such-flag"}));
  const Ended ended = run_to_end({"--no-such-flag"});
  CHECK_EQ(ended.status, 2);
  CHECK_EQ(ended.out, "");
}

TEST(values_that_cannot_work_stop_the_start_and_are_named) {
  for (const char* flag :
       {"--mem-queue-size=-1", "--output-buffer-timeout=-1s", "--node-id=1024", "--max-deflate-level=10",
        "--e2e-processing-latency-percentile=1.5", "--auth-http-request-method=put",
        "--e2e-processing-latency-window-time=0", "--data-path=/no/such/folder"}) {
    const std::string name = std::string(flag).substr(2, std::string(flag).find('=') - 2);
    Strings arguments{"--tcp-address=127.0.0.1:0", "--http-address=127.0.0.1:0", "--data-path=" + folder("data"), flag};
    const Ended ended = run_to_end(arguments);
    if (ended.status != 1 && ended.status != 2)
      fail(__LINE__, std::string(flag) + " gives status " + std::to_string(ended.status));
    std::string said = ended.err;
    for (char& c : said)
      c = c == ' ' || c == '_' ? '-' : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    CHECK_HAS(said, name.substr(name.rfind('-') + 1));
  }
}

TEST(a_flag_that_asks_for_tls_stops_the_start_with_a_word_on_tls) {
  for (const char* flag : {"--tls-required", "--tls-required=tcp-https", "--tls-cert=a.pem", "--tls-key=a.key",
                           "--tls-root-ca-file=a.pem", "--tls-client-auth-policy=require"}) {
    const Ended ended =
        run_to_end({"--tcp-address=127.0.0.1:0", "--http-address=127.0.0.1:0", "--data-path=" + folder("d"), flag});
    CHECK_EQ(ended.status, 1);
    CHECK_HAS(ended.err, "TLS");
  }
}

TEST(help_names_every_flag_and_version_says_what_it_answers_as) {
  const Ended help = run_to_end({"--help"});
  CHECK_EQ(help.status, 0);
  for (const char* flag :
       {"tcp-address", "http-address", "data-path", "mem-queue-size", "sync-every", "lookupd-tcp-address",
        "auth-http-address", "statsd-address", "max-rdy-count", "log-level", "config", "mem-only"}) {
    CHECK_HAS(help.out + help.err, std::string("-") + flag);
  }
  const Ended version = run_to_end({"--version"});
  CHECK_EQ(version.status, 0);
  CHECK_HAS(version.out, "nsqd v" + std::string(nsqd::kProtocolVersion));
  const std::string numbers = std::to_string(NSQD_VERSION_MAJOR) + "." + std::to_string(NSQD_VERSION_MINOR) + "." +
                              std::to_string(NSQD_VERSION_PATCH);
  CHECK_EQ(numbers, std::string(nsqd::kVersion));
}

TEST(what_is_not_read_of_the_flags_and_the_file_is_said) {
  const std::string path = g_folder + "/nsqd.cfg";
  write_file(path, "mem_onyl = true\n");
  const Ended ended = run_to_end({"--config=" + path, "--data-path=" + g_folder + "/none", "false", "--mem-only"});
  CHECK_HAS(ended.err, "no setting \"mem_onyl\"");
  CHECK_HAS(ended.err, "no flag is read from \"false\" on");
  CHECK_HAS(ended.err, "data-path");  // so --mem-only was not read
}

TEST(a_flag_wins_over_the_config_file_and_the_file_over_the_default) {
  const std::string path = g_folder + "/nsqd.cfg";
  write_file(path,
             "# settings\nmax_rdy_count = 77\nmsg_timeout = \"5s\"\nmax_msg_timeout = 9000\nid = 5\n"
             "nsqlookupd_tcp_addresses = [\n  \"a:1\",  # the first\n  'b:2'\n]\nlog_level = \"debug\"\n"
             "statsd_mem_stats = false\ndata_path = \"caf\\u00e9\"\nno_such_key = 1\n[table]\nmax_rdy_count = 1\n");
  const nsqd::Options options = options_of({"--config=" + path, "--msg-timeout=7s"});
  CHECK_EQ(options.max_rdy_count, 77);
  CHECK(options.msg_timeout == 7s);
  CHECK(options.max_msg_timeout == 9s);
  CHECK_EQ(options.node_id, 5);
  CHECK_EQ(options.lookupd_tcp_address, (Strings{"a:1", "b:2"}));
  CHECK(options.log_level == nsqd::Level::kDebug);
  CHECK(!options.statsd_mem_stats);
  CHECK_EQ(options.data_path, "café");
  CHECK_EQ(options.max_msg_size, nsqd::Options().max_msg_size);
}

TEST(a_config_file_that_is_wrong_names_file_line_and_key) {
  const std::string path = g_folder + "/nsqd.cfg";
  for (const char* wrong :
       {"max_rdy_count = lots", "max_rdy_count = \"lots\"", "max_rdy_count = [1 2]", "max_rdy_count"}) {
    write_file(path, std::string("# one\ntcp_address = \"127.0.0.1:0\"\n") + wrong + "\n");
    const std::string said = refusal({"--config=" + path});
    CHECK_HAS(said, path);
    CHECK_HAS(said, "line 3");
    CHECK_HAS(said, "max_rdy_count");
  }
  CHECK_HAS(refusal({"--config=" + g_folder + "/none.cfg"}), "none.cfg");
  CHECK_EQ(run_to_end({"--config=" + g_folder + "/none.cfg"}).status, 1);
}

// =====================================================================================================================
// Data path and metadata
// =====================================================================================================================

// Flags for a start that is meant to fail.
Strings flags_for(const std::string& data) {
  return {"--tcp-address=127.0.0.1:0", "--http-address=127.0.0.1:0", "--data-path=" + data};
}

TEST(a_second_daemon_on_the_same_data_path_is_refused_and_harms_nobody) {
  Process first;
  Client client(first);
  client.pub("t", "x");
  const Ended second = run_to_end(flags_for(first.data_path));
  CHECK_EQ(second.status, 1);
  CHECK_HAS(second.err, "failed to lock data-path: cannot flock directory " + first.data_path);
  CHECK_HAS(second.err, "in use by another instance of nsqd");
  CHECK_THROWS(std::runtime_error, nsqd::Daemon(local_options(first.data_path)));
  client.pub("t", "y");
  CHECK_EQ(drain(first, "t", "c").size(), 2U);
}

TEST(topics_channels_and_pauses_survive_a_restart) {
  Process d;
  create_channel(d, "a", "one");
  create_channel(d, "a", "two");
  create_channel(d, "b", "gone#ephemeral");
  post(d, "/topic/create?topic=c%23ephemeral");
  post(d, "/channel/pause?topic=a&channel=two");
  post(d, "/topic/pause?topic=b");
  for (const int with : {SIGTERM, SIGKILL}) {
    EVENTUALLY(read_file(d.data_path + "/nsqd.dat").find("\"b\"") != std::string::npos);
    d.restart(with);
    const std::string stats = get(d, "/stats?format=json");
    CHECK_EQ(stats.find("ephemeral"), std::string::npos);
    CHECK_HAS(get(d, "/stats?format=json&topic=a&channel=one"), "\"paused\":false");
    CHECK_HAS(get(d, "/stats?format=json&topic=a&channel=two"), "\"paused\":true");
    CHECK_HAS(get(d, "/stats?format=json&topic=b"), "\"paused\":true");
  }
  CHECK_EQ(files(d.data_path, ".tmp"), Strings{});
}

TEST(a_deleted_topic_or_channel_stays_deleted_with_all_it_held) {
  Process d;
  create_channel(d, "t", "stays");
  create_channel(d, "t", "goes");
  create_channel(d, "u", "c");
  Client client(d);
  client.mpub("t", numbered("m", 0, 100));
  client.mpub("u", numbered("m", 0, 100));
  post(d, "/channel/delete?topic=t&channel=goes");
  post(d, "/topic/delete?topic=u");
  for (const char* part : {"u.", "u:", ":goes"}) EVENTUALLY(files(d.data_path, part).empty());
  for (const char* name : {"\"u\"", "\"goes\""})
    EVENTUALLY(read_file(d.data_path + "/nsqd.dat").find(name) == std::string::npos);
  d.restart();
  CHECK_EQ(channel_count(d, "t", "stays", "depth"), 100);
  CHECK_EQ(channel_count(d, "t", "goes", "depth"), -1);
  CHECK_EQ(topic_count(d, "u", "depth"), -1);
  create_channel(d, "t", "goes");
  create_channel(d, "u", "c");
  CHECK_EQ(channel_count(d, "t", "goes", "depth"), 0);
  CHECK_EQ(channel_count(d, "u", "c", "depth"), 0);
}

TEST(a_corrupt_nsqd_dat_stops_the_start_and_is_left_as_it_was) {
  const std::string path = folder("data") + "/nsqd.dat";
  for (const char* wrong : {"", "{", "[]x", "{\"topics\":[{\"name\":1}]}", "{\"topics\":[],}", "\xff\xfe"}) {
    write_file(path, wrong);
    const Ended ended = run_to_end(flags_for(folder("data")));
    CHECK_EQ(ended.status, 1);
    CHECK_HAS(ended.err, path);
    CHECK_EQ(read_file(path), wrong);
  }
}

TEST(an_nsqd_dat_of_nsqd_itself_is_taken_with_what_it_does_not_know) {
  write_file(
      folder("data") + "/nsqd.dat",
      "{\"topics\":[{\"channels\":[{\"name\":\"c\",\"paused\":true,\"new\":[1,{}]}],\"name\":\"t\",\"paused\":false},"
      "{\"channels\":null,\"name\":\"u\",\"paused\":true},{\"channels\":[],\"name\":\"not "
      "valid!\"}],\"version\":\"9.9.9\"}");
  Process d;
  CHECK_HAS(d.log(), "skipping creation of invalid topic not valid!");
  CHECK_EQ(channel_count(d, "t", "c", "depth"), 0);
  CHECK_HAS(get(d, "/stats?format=json&topic=u"), "\"paused\":true");
}

TEST(a_data_path_that_cannot_be_written_is_said_at_the_start) {
  const std::string data = folder("data");
#ifdef __linux__  // root may write everywhere but on what is mounted read-only
  if (getuid() == 0 && (unshare(CLONE_NEWNS) != 0 || mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
                        mount("none", data.c_str(), "tmpfs", MS_RDONLY, nullptr) != 0)) {
    throw Skipped("may not mount a file system that is read-only");
  }
#endif
  if (getuid() != 0) chmod(data.c_str(), 0500);
  const Ended ended = run_to_end(flags_for(data));
  CHECK_EQ(ended.status, 1);
  CHECK_HAS(ended.err, data);
}

// =====================================================================================================================
// Protocol
// =====================================================================================================================

TEST(a_message_goes_from_a_publisher_to_a_consumer) {
  Process d;
  Client publisher(d), consumer(d);
  const int64_t before = now_ns();
  publisher.pub("clicks", "hello");
  consumer.sub("clicks", "archive");
  const Message message = consumer.message();
  CHECK_EQ(message.body, "hello");
  CHECK_EQ(message.attempts, 1);
  CHECK(message.timestamp >= before && message.timestamp <= now_ns());
  CHECK_EQ(message.id.find_first_not_of("0123456789abcdef"), std::string::npos);
  CHECK_EQ(channel_count(d, "clicks", "archive", "in_flight_count"), 1);
  consumer.fin(message);
  EVENTUALLY(channel_count(d, "clicks", "archive", "in_flight_count") == 0);
  CHECK_EQ(channel_count(d, "clicks", "archive", "depth"), 0);
}

TEST(a_dialogue_is_the_same_whole_and_byte_by_byte) {
  Process d;
  const std::string body = "IDENTIFY\n" + be32(2) + "{}NOP\nPUB t\r\n" + be32(3) + "abc" + "DPUB t 0\n" + be32(1) +
                           "d" + "MPUB t\n" + be32(18) + be32(2) + be32(3) + "\n\r\n" + be32(3) + "PUB" +
                           "SUB t c\nRDY 1\n";
  for (const bool whole : {true, false}) {
    Client client(d);
    if (whole) client.send(body);
    for (size_t i = 0; !whole && i < body.size(); i++) client.send(body.substr(i, 1));
    for (int i = 0; i < 5; i++) client.expect("OK");
    for (const char* want : {"abc", "d", "\n\r\n", "PUB"}) {
      const Message message = client.message();
      CHECK_EQ(message.body, want);
      client.fin(message);
    }
    client.command("CLS");
    client.expect("CLOSE_WAIT");
  }
}

TEST(a_thousand_commands_in_one_write_get_a_thousand_answers_in_order) {
  Process d;
  Client client(d);
  std::string all;
  for (size_t i = 0; i < 1000; i++) all += "PUB t\n" + be32(4) + be32(i);
  client.send(all + "NO SUCH\n");
  for (int i = 0; i < 1000; i++) client.expect("OK");
  client.expect_error("E_INVALID invalid command NO");
  CHECK(client.closed());
  const auto messages = drain(d, "t", "c");
  CHECK_EQ(messages.size(), 1000U);
}

TEST(any_bytes_and_any_size_up_to_the_limit_come_back_as_they_went) {
  Process d;
  Client client(d);
  std::string bytes;
  for (int i = 0; i < 256; i++) bytes += static_cast<char>(i);
  Strings bodies{bytes, "x", "\n", std::string(1, '\0'), std::string(1048576, 'y')};
  for (const auto& body : bodies) client.pub("t", body);
  post(d, "/pub?topic=t", bytes);
  bodies.push_back(bytes);
  CHECK_EQ(sorted(bodies_of(drain(d, "t", "c"))), sorted(bodies));
  client.command("PUB t", std::string(1048577, 'z'));
  client.expect_error("E_BAD_MESSAGE PUB message too big 1048577 > 1048576");
}

TEST(identify_negotiates_what_there_is_and_nothing_more) {
  Process d({"--max-rdy-count=9"});
  Client client(d);
  client.command("IDENTIFY",
                 "{\"client_id\":\"me\",\"feature_negotiation\":true,\"tls_v1\":true,\"snappy\":false,"
                 "\"msg_timeout\":5000,\"sample_rate\":50,\"output_buffer_size\":-1}");
  const auto answer = client.frame();
  CHECK(answer && answer->type == 0);
  for (const char* part :
       {"\"max_rdy_count\":9,", "\"version\":\"1.3.0\"", "\"msg_timeout\":5000", "\"tls_v1\":false", "\"snappy\":false",
        "\"sample_rate\":50", "\"auth_required\":false", "\"output_buffer_size\":1,"}) {
    CHECK_HAS(answer->data, part);
  }
  client.identify("{\"client_id\":\"me\",\"hostname\":\"here\"}");
  client.sub("t", "c", 9);
  CHECK_HAS(get(d, "/stats?format=json"), "\"client_id\":\"me\",\"hostname\":\"here\"");
  client.command("RDY 10");
  client.expect_error("E_INVALID RDY count 10 out of range 0-9");
}

TEST(snappy_and_deflate_are_declined_and_clients_go_on_without) {
  Local d;
  Client client(d);
  client.command("IDENTIFY", "{\"feature_negotiation\":true,\"tls_v1\":true,\"snappy\":true,\"deflate\":false}");
  const auto answer = client.frame();
  CHECK(answer && answer->data.find("\"snappy\":false") != std::string::npos);
  client.pub("t", "plain");
}

TEST(an_error_of_a_message_keeps_the_connection_and_any_other_ends_it) {
  Process d;
  Client client(d);
  client.sub("t", "c");
  for (const char* command : {"FIN", "REQ", "TOUCH"}) {
    client.command(std::string(command) + " 0123456789abcdef" + (command == std::string("REQ") ? " 0" : ""));
    client.expect_error(std::string("E_") + command + "_FAILED");
  }
  client.pub("t", "still here");
  for (const char* fatal : {"FIN short", "RDY x", "SUB t c", "PUB", "nonsense", ""}) {
    Client other(d);
    if (std::string(fatal).rfind("SUB", 0) != 0) other.sub("t", "d", 0);
    if (std::string(fatal).rfind("SUB", 0) == 0) other.sub("t", "e", 0);
    other.command(fatal);
    other.expect_error("E_INVALID");
    CHECK(other.closed());
  }
}

TEST(bad_magic_and_endless_lines_are_cut_off) {
  Process d;
  Socket http_client(connect_to(d.tcp));
  http_client.send("GET / HTTP/1.1\r\n\r\n");
  CHECK_HAS(http_client.take_rest(), "E_BAD_PROTOCOL");
  Client endless(d);
  endless.try_send("PUB " + std::string(100000, 'x'), patience());
  endless.closed();  // with or without a reset, but soon
  Client(d).pub("t", "x");
}

TEST(heartbeats_come_and_a_client_that_never_answers_is_closed) {
  Process d;
  Client client(d);
  client.identify("{\"heartbeat_interval\":1000}");
  const auto start = Clock::now();
  const auto beat = client.raw_frame(patience(), __LINE__);
  CHECK(beat && beat->data == "_heartbeat_");
  CHECK(ms_since(start) > 800);
  const std::string rest = client.take_rest();
  CHECK(ms_since(start) > 1800);
  CHECK(rest.size() < 100);
}

TEST(after_cls_no_more_messages_come_and_the_last_can_be_finished) {
  Process d;
  Client client(d);
  client.sub("t", "c", 2);
  Client publisher(d);
  publisher.mpub("t", {"a", "b", "c"});
  const Message a = client.message(), b = client.message();
  client.command("CLS");
  client.expect("CLOSE_WAIT");
  client.fin(a);
  client.fin(b);
  client.command("RDY 5");
  EVENTUALLY(channel_count(d, "t", "c", "in_flight_count") == 0);
  client.pub("other", "barrier");  // a message would have come before its answer
  CHECK_EQ(channel_count(d, "t", "c", "depth"), 1);
}

TEST(ready_is_a_ceiling_and_0_stops_the_flow) {
  Process d;
  Client client(d);
  client.sub("t", "c", 0);
  Client(d).mpub("t", numbered("", 0, 20));
  client.command("RDY 3");
  std::vector<Message> held;
  for (int i = 0; i < 3; i++) held.push_back(client.message());
  client.pub("barrier", "x");
  CHECK_EQ(channel_count(d, "t", "c", "in_flight_count"), 3);
  client.fin(held[0]);
  held[0] = client.message();
  client.command("RDY 0");
  for (const auto& message : held) client.fin(message);
  client.pub("barrier", "x");
  EVENTUALLY(channel_count(d, "t", "c", "in_flight_count") == 0);
  CHECK_EQ(channel_count(d, "t", "c", "depth"), 16);
}

TEST(mpub_stores_all_or_nothing) {
  Process d;
  Client good(d), bad(d);
  good.mpub("t", {"a", "b"});
  bad.send("MPUB t\n" + be32(20) + be32(3) + be32(1) + "c" + be32(1) + "d" + be32(0));
  bad.expect_error("E_BAD_MESSAGE MPUB invalid message(2) body size 0");
  CHECK_EQ(sorted(bodies_of(drain(d, "t", "c"))), (Strings{"a", "b"}));
}

TEST(a_names_rules_hold_for_topics_and_channels) {
  Process d;
  const std::string longest(64, 'n');
  for (const auto& name : {longest, std::string("a.b_c-D9"), std::string("e#ephemeral")}) {
    Client client(d);
    client.pub(name, "x");
    client.sub(name, name, 0);
  }
  for (const auto& name :
       {longest + "n", std::string("a/b"), std::string("#ephemeral"), std::string("a#b"), std::string("../x")}) {
    Client client(d), subscriber(d);
    client.command("PUB " + name);
    client.expect_error("E_BAD_TOPIC");
    subscriber.command("SUB t " + name);
    subscriber.expect_error("E_BAD_CHANNEL");
  }
}

TEST(ids_are_unique_over_topics_and_restarts) {
  Process d;
  std::set<std::string> ids;
  for (int round = 0; round < 3; round++) {
    for (const char* topic : {"t", "u"}) {
      Client(d).mpub(topic, Strings(5000, "x"));
      for (const auto& message : drain(d, topic, "c")) ids.insert(message.id);
    }
    d.restart(round == 0 ? SIGTERM : SIGKILL);
  }
  CHECK(ids.size() >= 3U * 5000);  // nsqd's are unique in a topic
  CHECK_EQ(ids.size(), 3U * 2 * 5000);
}

TEST(it_listens_on_ipv6_and_on_names) {
  sockaddr_in6 address{};
  address.sin6_family = AF_INET6;
  address.sin6_addr = in6addr_loopback;
  const int fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
  Socket client(fd);
  if (bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) throw Skipped("no IPv6 here");
  if (gethostbyname("localhost") == nullptr) throw Skipped("no name localhost here");
  nsqd::Options options = local_options();
  options.tcp_address = "[::1]:0";
  options.http_address = "localhost:0";
  Local d(options);
  address.sin6_port = htons(static_cast<uint16_t>(d.tcp));
  client = Socket(socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0));
  CHECK(client.connected(reinterpret_cast<sockaddr*>(&address), sizeof address));
  client.send("  V2PUB t\n" + be32(1) + "x");
  CHECK_EQ(client.take(10), be32(6) + be32(0) + "OK");
  CHECK(d.http > 0);
}

TEST(it_listens_on_unix_sockets_and_removes_them) {
  const std::string path = g_folder + "/s.tcp", web = g_folder + "/s.http";
  {
    Process d({"--tcp-address=" + path, "--http-address=" + web});
    Client client(path);
    client.pub("t", "x");
    Client consumer(path);
    consumer.sub("t", "c");
    CHECK_EQ(consumer.message().body, "x");
    Socket http_client(connect_to(web));
    http_client.send("GET /info HTTP/1.0\r\n\r\n");
    CHECK_HAS(http_client.take_rest(), "\"tcp_port\":-1");
    d.kill9();  // leaves its sockets behind, which is no trouble
    d.start();
    Client(path).pub("t", "y");
    CHECK_EQ(d.stop(), 0);
  }
  CHECK(!exists(path) && !exists(web));
}

// =====================================================================================================================
// Delivery
// =====================================================================================================================

TEST(each_channel_gets_every_message_and_its_consumers_share_them) {
  Process d;
  Client a1(d), a2(d), b(d), publisher(d);
  a1.sub("t", "a", 50);
  a2.sub("t", "a", 50);
  b.sub("t", "b", 100);
  publisher.mpub("t", numbered("m", 0, 100));
  std::map<std::string, Strings> got;
  for (int i = 0; i < 50; i++) {
    got["a"].push_back(a1.message().body);
    got["a"].push_back(a2.message().body);
  }
  for (int i = 0; i < 100; i++) got["b"].push_back(b.message().body);
  CHECK_EQ(sorted(got["a"]), sorted(numbered("m", 0, 100)));
  CHECK_EQ(sorted(got["b"]), sorted(numbered("m", 0, 100)));
}

TEST(consumers_that_are_ready_for_all_get_an_even_share_of_a_batch) {
  Process d;
  Client a(d), b(d), c(d), publisher(d);
  for (Client* consumer : {&a, &b, &c}) consumer->sub("t", "c", 1000);
  publisher.mpub("t", numbered("m", 0, 90));
  Strings got;
  for (Client* consumer : {&a, &b, &c})
    for (int i = 0; i < 30; i++) got.push_back(consumer->message().body);
  CHECK_EQ(sorted(got), sorted(numbered("m", 0, 90)));
}

TEST(the_first_channel_gets_all_that_waited_and_a_later_one_what_comes_after_it) {
  Process d;
  Client publisher(d);
  publisher.mpub("t", numbered("early", 0, 10));
  create_channel(d, "t", "first");
  EVENTUALLY(channel_count(d, "t", "first", "depth") == 10);
  create_channel(d, "t", "second");
  publisher.mpub("t", numbered("late", 0, 5));
  EVENTUALLY(channel_count(d, "t", "first", "depth") == 15);
  CHECK_EQ(sorted(bodies_of(drain(d, "t", "second"))), numbered("late", 0, 5));
  post(d, "/channel/delete?topic=t&channel=first");
  post(d, "/channel/delete?topic=t&channel=second");
  publisher.mpub("t", numbered("again", 0, 5));
  CHECK_EQ(sorted(bodies_of(drain(d, "t", "third"))), numbered("again", 0, 5));
}

TEST(messages_come_in_the_order_in_which_they_were_published) {
  Process d;
  Client consumer(d), publisher(d);
  publisher.mpub("t", numbered("m", 0, 100));
  consumer.sub("t", "c", 10);
  Strings got;
  for (int i = 0; i < 300; i++) {
    if (i == 90) publisher.mpub("t", numbered("m", 100, 300));
    const Message message = consumer.message();
    got.push_back(message.body);
    consumer.fin(message);
  }
  CHECK_EQ(got, numbered("m", 0, 300));
}

TEST(a_message_in_flight_comes_back_after_its_timeout) {
  Process d({"--msg-timeout=300ms"});
  Client consumer(d);
  consumer.sub("t", "c");
  Client(d).pub("t", "x");
  for (int attempt = 1; attempt <= 3; attempt++) {
    const Message message = consumer.message();
    CHECK_EQ(message.attempts, attempt);
    CHECK_EQ(message.body, "x");
  }
  CHECK_EQ(channel_count(d, "t", "c", "timeout_count"), 2);
}

TEST(a_touch_puts_the_timeout_off_until_the_cap) {
  Process d({"--max-msg-timeout=2500ms"});
  Client consumer(d);
  consumer.identify("{\"msg_timeout\":1000}");
  consumer.sub("t", "c");
  Client(d).pub("t", "x");
  const Message first = consumer.message();
  const auto start = Clock::now();
  std::optional<Message> again;
  while (!again) {
    consumer.touch(first);
    again = consumer.try_message(100ms);
  }
  CHECK_EQ(again->attempts, 2);
  CHECK(ms_since(start) >= 2400);
}

TEST(a_flood_of_touches_keeps_nobody_waiting) {
  Process d({"--max-msg-timeout=1m"});  // the default timeout, so that all of them ask for the same deadline
  Client consumer(d);
  consumer.sub("t", "c");
  Client(d).pub("t", "x");
  const Message message = consumer.message();
  std::string flood;
  for (int i = 0; i < 300000; i++) flood += "TOUCH " + message.id + "\n";
  consumer.send(flood);
  consumer.fin(message);
  EVENTUALLY(channel_count(d, "t", "c", "in_flight_count") == 0);
}

TEST(a_requeued_message_comes_back_at_once_or_when_asked) {
  Process d;
  Client consumer(d);
  consumer.sub("t", "c");
  Client(d).pub("t", "x");
  consumer.req(consumer.message(), 0);
  Message message = consumer.message();
  CHECK_EQ(message.attempts, 2);
  const auto start = Clock::now();
  consumer.req(message, 400);
  EVENTUALLY(channel_count(d, "t", "c", "deferred_count") == 1);
  message = consumer.message();
  CHECK(ms_since(start) >= 395);
  CHECK_EQ(message.attempts, 3);
  CHECK_EQ(channel_count(d, "t", "c", "requeue_count"), 2);
}

TEST(a_requeue_is_cut_to_the_longest_that_is_allowed_and_a_deferred_publish_refused) {
  Process d({"--max-req-timeout=300ms"});
  Client consumer(d), publisher(d);
  consumer.sub("t", "c");
  publisher.pub("t", "x");
  const Message message = consumer.message();
  const auto start = Clock::now();
  consumer.req(message, 100000000);
  CHECK_EQ(consumer.message().attempts, 2);
  CHECK(ms_since(start) >= 295);
  publisher.command("DPUB t 301", "x");
  publisher.expect_error("E_INVALID DPUB timeout 301 out of range 0-300");
}

TEST(a_deferred_message_comes_when_it_is_due_and_not_before) {
  Process d;
  Client consumer(d), publisher(d);
  consumer.sub("t", "c", 10);
  const auto start = Clock::now();
  publisher.dpub("t", 900, "late");
  publisher.dpub("t", 450, "sooner");
  post(d, "/pub?topic=t&defer=0", "now");
  CHECK_EQ(consumer.message().body, "now");
  CHECK_EQ(channel_count(d, "t", "c", "deferred_count"), 2);
  CHECK_EQ(consumer.message().body, "sooner");
  CHECK(ms_since(start) >= 445);
  CHECK_EQ(consumer.message().body, "late");
  CHECK(ms_since(start) >= 895);
}

TEST(the_space_that_many_deferred_messages_took_is_given_back) {
  Process d({"--msg-timeout=300ms"});
  Client consumer(d), publisher(d);
  consumer.sub("t", "c", 1000);
  for (int i = 0; i < 500; i++) publisher.dpub("t", 100, "x");
  for (int i = 0; i < 500; i++) consumer.fin(consumer.message());
  const std::string ledger = d.data_path + "/t:c.ledger";
  CHECK(read_file(ledger).size() > 4096);
  EVENTUALLY(read_file(ledger).size() == 4096);
  publisher.pub("t", "again");
  CHECK_EQ(consumer.message().body, "again");
}

TEST(consumers_may_finish_and_requeue_what_they_hold_in_any_order) {
  Process d;
  Client publisher(d);
  std::vector<std::unique_ptr<Client>> consumers;
  std::vector<std::vector<Message>> held(3);
  for (size_t i = 0; i < held.size(); i++) {
    consumers.push_back(std::make_unique<Client>(d));
    consumers[i]->sub("t", "c", 100);
  }
  Strings finished;
  uint32_t dice = 1;
  const auto roll = [&dice](size_t sides) { return (dice = dice * 1664525 + 1013904223) / 65536 % sides; };
  for (int batch = 0; batch < 10; batch++) {
    publisher.mpub("t", numbered("m", 300 * batch, 300 * (batch + 1)));
    while (finished.size() < static_cast<size_t>(300 * (batch + 1))) {
      const size_t who = roll(held.size());
      for (size_t most = roll(20); most > 0; most--)
        if (auto message = consumers[who]->try_message(0ms)) held[who].push_back(std::move(*message));
      for (size_t most = roll(20); most > 0 && !held[who].empty(); most--) {
        std::swap(held[who][roll(held[who].size())], held[who].back());
        if (roll(4) == 0) {
          consumers[who]->req(held[who].back(), 0);
        } else {
          consumers[who]->fin(held[who].back());
          finished.push_back(held[who].back().body);
        }
        held[who].pop_back();
      }
    }
  }
  CHECK_EQ(sorted(finished), sorted(numbered("m", 0, 3000)));
  EVENTUALLY(channel_count(d, "t", "c", "in_flight_count") == 0);
  CHECK_EQ(channel_count(d, "t", "c", "depth"), 0);
}

TEST(only_the_one_who_holds_a_message_can_finish_it) {
  Process d;
  Client holder(d), other(d);
  holder.sub("t", "c");
  other.sub("t", "c", 0);
  Client(d).pub("t", "x");
  const Message message = holder.message();
  other.fin(message);
  other.expect_error("E_FIN_FAILED FIN " + message.id + " failed");
  holder.fin(message);
  holder.fin(message);
  holder.expect_error("E_FIN_FAILED FIN " + message.id + " failed ID not in flight");
}

TEST(what_a_lost_consumer_held_goes_to_another_after_the_timeout) {
  Process d({"--msg-timeout=500ms"});
  {
    Client lost(d);
    lost.sub("t", "c", 5);
    Client(d).mpub("t", numbered("m", 0, 5));
    for (int i = 0; i < 5; i++) lost.message();
  }
  const auto messages = drain(d, "t", "c");
  CHECK_EQ(sorted(bodies_of(messages)), numbered("m", 0, 5));
  for (const auto& message : messages) CHECK_EQ(message.attempts, 2);
}

TEST(a_paused_channel_or_topic_holds_its_messages) {
  Process d;
  Client consumer(d), publisher(d);
  consumer.sub("t", "c", 10);
  post(d, "/channel/pause?topic=t&channel=c");
  publisher.pub("t", "a");
  EVENTUALLY(channel_count(d, "t", "c", "depth") == 1);
  CHECK_EQ(channel_count(d, "t", "c", "in_flight_count"), 0);
  post(d, "/topic/pause?topic=t");
  post(d, "/channel/unpause?topic=t&channel=c");
  CHECK_EQ(consumer.message().body, "a");
  publisher.pub("t", "b");
  CHECK_EQ(topic_count(d, "t", "depth"), 1);
  CHECK_EQ(channel_count(d, "t", "c", "depth"), 0);
  post(d, "/topic/unpause?topic=t");
  CHECK_EQ(consumer.message().body, "b");
}

TEST(emptying_a_channel_drops_all_that_it_has_and_nothing_of_others) {
  Process d;
  Client consumer(d), publisher(d);
  create_channel(d, "t", "other");
  consumer.sub("t", "c", 2);
  publisher.mpub("t", numbered("m", 0, 5));
  publisher.dpub("t", 60000, "deferred");
  const Message held = consumer.message();
  consumer.message();
  EVENTUALLY(channel_count(d, "t", "c", "deferred_count") == 1);
  post(d, "/channel/empty?topic=t&channel=c");
  for (const char* key : {"depth", "in_flight_count", "deferred_count"}) CHECK_EQ(channel_count(d, "t", "c", key), 0);
  consumer.fin(held);
  consumer.expect_error("E_FIN_FAILED");
  publisher.pub("t", "new");
  CHECK_EQ(consumer.message().body, "new");
  CHECK_EQ(channel_count(d, "t", "other", "depth"), 6);
}

TEST(emptying_a_topic_drops_what_no_channel_has_yet) {
  Process d;
  Client publisher(d);
  publisher.mpub("t", numbered("old", 0, 5));
  post(d, "/topic/empty?topic=t");
  CHECK_EQ(topic_count(d, "t", "depth"), 0);
  publisher.mpub("t", numbered("new", 0, 5));
  CHECK_EQ(bodies_of(drain(d, "t", "c")), numbered("new", 0, 5));
}

TEST(deleting_a_channel_or_topic_closes_its_consumers_and_not_its_publishers) {
  Process d;
  Client on_channel(d), on_topic(d), publisher(d);
  publisher.pub("t", "x");
  on_channel.sub("t", "c", 0);
  on_topic.sub("t", "d", 0);
  post(d, "/channel/delete?topic=t&channel=c");
  CHECK(on_channel.closed());
  CHECK_EQ(channel_count(d, "t", "d", "client_count"), 1);
  post(d, "/topic/delete?topic=t");
  CHECK(on_topic.closed());
  publisher.pub("t", "a new topic of that name");
  CHECK_EQ(topic_count(d, "t", "message_count"), 1);
}

TEST(a_sample_rate_passes_about_that_share) {
  Process d;
  Client consumer(d);
  consumer.command("IDENTIFY", "{\"feature_negotiation\":true,\"sample_rate\":29}");
  consumer.frame();
  consumer.sub("t", "c", 2500);
  Client(d).mpub("t", Strings(4000, "x"));
  EVENTUALLY(channel_count(d, "t", "c", "depth") == 0);
  const int64_t taken = channel_count(d, "t", "c", "in_flight_count");
  CHECK_EQ(taken < 1000 || taken > 1400 ? taken : 1200, 1200);  // 30 % of 4,000, give or take seven standard deviations
}

TEST(a_limit_on_consumers_is_kept) {
  Process d({"--max-channel-consumers=2"});
  Client first(d), second(d), third(d);
  first.sub("t", "c");
  second.sub("t", "c");
  third.command("SUB t c");
  third.expect_error("E_SUB_FAILED SUB failed consumers for t:c exceeds limit of 2");
  first.close();
  EVENTUALLY(channel_count(d, "t", "c", "client_count") == 1);
  Client fourth(d);
  fourth.sub("t", "c");
}

TEST(the_numbers_in_the_stats_add_up) {
  Process d;
  Client consumer(d), publisher(d);
  create_channel(d, "t", "c");
  publisher.mpub("t", numbered("m", 0, 50));
  publisher.dpub("t", 60000, "later");
  consumer.sub("t", "c", 20);
  for (int i = 0; i < 10; i++) consumer.fin(consumer.message());
  consumer.req(consumer.message(), 0);
  consumer.command("RDY 0");
  publisher.pub("barrier", "x");
  EVENTUALLY(channel_count(d, "t", "c", "requeue_count") == 1);
  const auto count = [&](const char* key) { return channel_count(d, "t", "c", key); };
  CHECK_EQ(count("message_count"), 51);
  EVENTUALLY(count("depth") + count("in_flight_count") + count("deferred_count") == 41);
  CHECK_EQ(count("deferred_count"), 1);
  CHECK_EQ(topic_count(d, "t", "message_count"), 51);
  CHECK_EQ(topic_count(d, "t", "message_bytes"), 10 * 2 + 40 * 3 + 5);
  const std::string all = get(d, "/stats?format=json");
  CHECK_HAS(all, "\"finish_count\":10");
  CHECK_HAS(all, "\"pub_counts\":[{\"topic\":\"");
}

// =====================================================================================================================
// HTTP
// =====================================================================================================================

TEST(curl_can_publish_and_look) {
  Process d;
  CHECK_EQ(get(d, "/ping"), "OK");
  CHECK_EQ(post(d, "/pub?topic=t", "one"), "OK");
  CHECK_EQ(post(d, "/mpub?topic=t", "two\n\nthree\nfour"), "OK");
  CHECK_EQ(post(d, "/mpub?topic=t&binary=true", be32(2) + be32(4) + "fi\nv" + be32(3) + "six"), "OK");
  CHECK_EQ(sorted(bodies_of(drain(d, "t", "c"))), (Strings{"fi\nv", "four", "one", "six", "three", "two"}));
  CHECK_EQ(number_at(get(d, "/info"), "tcp_port", 0), d.tcp);
  CHECK_HAS(get(d, "/stats"), "[t              ] depth: 0 ");
  CHECK_EQ(http(d, "POST", "/pub?topic=t").body, "{\"message\":\"MSG_EMPTY\"}");
  CHECK_EQ(http(d, "POST", "/pub?topic=t", std::string(1048577, 'x')).status, 413);
  CHECK_EQ(http(d, "GET", "/pub?topic=t").status, 405);
  CHECK_EQ(http(d, "GET", "/nowhere").body, "{\"message\":\"NOT_FOUND\"}");
}

TEST(one_connection_takes_many_requests_even_before_their_answers) {
  Process d;
  Http connection(d);
  for (int i = 0; i < 50; i++) connection.request("POST", "/pub?topic=t", "m" + std::to_string(i));
  connection.request("GET", "/stats?format=json");
  connection.request("GET", "/nowhere");
  for (int i = 0; i < 50; i++) CHECK_EQ(connection.reply().body, "OK");
  const Reply stats = connection.reply();
  CHECK_EQ(number_at(stats.body, "message_count", 0), 50);
  CHECK_EQ(stats.headers.at("x-nsq-content-type"), "nsq; version=1.0");
  CHECK_EQ(connection.reply().status, 404);
}

TEST(chunked_bodies_and_expect_100_continue_work_byte_by_byte) {
  Process d;
  Http connection(d);
  const std::string head = "POST /pub?topic=t HTTP/1.1\r\nHost: x\r\n";
  for (const char c : head + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nT: 1\r\n\r\n") {
    connection.send(std::string(1, c));
  }
  CHECK_EQ(connection.reply().body, "OK");
  connection.send(head + "Content-Length: 4\r\nExpect: 100-continue\r\n\r\n");
  CHECK_EQ(connection.take_line(), "HTTP/1.1 100 Continue\r\n");
  connection.take_line();
  connection.send("late");
  CHECK_EQ(connection.reply().body, "OK");
  CHECK_EQ(sorted(bodies_of(drain(d, "t", "c"))), (Strings{"hello world", "late"}));
}

TEST(http_1_0_and_connection_close_end_the_connection) {
  Process d;
  for (const char* request :
       {"GET /ping HTTP/1.0\r\n\r\n", "GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"}) {
    Http connection(d);
    connection.send(request);
    const std::string all = connection.take_rest();
    CHECK_HAS(all, " 200 OK\r\n");
    CHECK_EQ(all.substr(all.size() - 6), "\r\n\r\nOK");
  }
}

TEST(bad_requests_are_refused_and_stop_nobody) {
  Process d;
  const std::string host = "Host: x\r\n";
  for (const std::string& request :
       Strings{"nonsense\r\n\r\n", "GET /ping\r\n\r\n" + host,
               "GET /ping HTTP/1.1\r\n" + host + "a header without colon\r\n\r\n",
               "POST /pub?topic=t HTTP/1.1\r\n" + host + "Content-Length: -1\r\n\r\n",
               "POST /pub?topic=t HTTP/1.1\r\n" + host + "Content-Length: 1x\r\n\r\nx",
               "POST /pub?topic=t HTTP/1.1\r\n" + host + "Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
               "POST /pub?topic=t HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\nzz\r\n",
               "POST /pub?topic=t HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nx"}) {
    Http connection(d);
    connection.send(request);
    const std::string answer = connection.take_rest();
    if (answer.find("HTTP/1.1 2") != std::string::npos) fail(__LINE__, show(request) + " gets " + show(answer));
  }
  Http huge(d);
  huge.try_send("GET /ping HTTP/1.1\r\n" + host + "X: " + std::string(3000000, 'x') + "\r\n\r\n", patience());
  CHECK_EQ(huge.take_rest().find("HTTP/1.1 200"), std::string::npos);
  CHECK_EQ(get(d, "/ping"), "OK");
  CHECK_EQ(topic_count(d, "t", "message_count") <= 0, true);
}

TEST(the_stats_are_a_text_for_people_and_metrics_for_machines) {
  Process d({"--e2e-processing-latency-percentile=0.99"});
  Client consumer(d), publisher(d);
  consumer.identify("{\"client_id\":\"me\",\"hostname\":\"here\",\"user_agent\":\"test/1\"}");
  consumer.sub("t", "c", 2);
  publisher.mpub("t", {"a", "b", "c"});
  consumer.fin(consumer.message());
  EVENTUALLY(channel_count(d, "t", "c", "depth") == 0);
  const std::string text = get(d, "/stats");
  for (const char* part : {"\n   [t              ] depth: 0     be-depth: 0     msgs: 3        e2e%: ",
                           "\n      [c                        ] depth: 0 ", "\n        [V2 here:", " test/1",
                           "state: 3 inflt: 2    rdy: 2    fin: 1 ", "topics: t=3"}) {
    CHECK_HAS(text, part);
  }
  const std::string metrics = get(d, "/metrics");
  for (const char* line : {"# TYPE nsqd_topic_messages_total counter\n", "\nnsqd_topic_messages_total{topic=\"t\"} 3\n",
                           "\nnsqd_channel_in_flight{topic=\"t\",channel=\"c\"} 2\n", "\nnsqd_healthy 1\n"}) {
    CHECK_HAS(metrics, line);
  }
  CHECK_HAS(http(d, "GET", "/", "", "Accept: text/html\r\n").body, "<html");
  CHECK_EQ(http(d, "GET", "/").status, 404);
}

TEST(topics_and_channels_are_managed_over_http) {
  Process d;
  const std::string both = "?topic=t&channel=c";
  CHECK_EQ(http(d, "POST", "/channel/create" + both).body, "{\"message\":\"TOPIC_NOT_FOUND\"}");
  create_channel(d, "t", "c");
  for (const char* what : {"pause", "unpause", "empty"}) {
    post(d, "/topic/" + std::string(what) + "?topic=t");
    post(d, "/channel/" + std::string(what) + both);
  }
  post(d, "/channel/delete" + both);
  CHECK_EQ(http(d, "POST", "/channel/delete" + both).body, "{\"message\":\"CHANNEL_NOT_FOUND\"}");
  post(d, "/topic/delete?topic=t");
  CHECK_EQ(http(d, "POST", "/topic/delete?topic=t").body, "{\"message\":\"TOPIC_NOT_FOUND\"}");
  CHECK_HAS(get(d, "/stats?format=json"), "\"topics\":[]");
}

TEST(the_log_level_can_be_changed_while_it_runs) {
  Process d;
  CHECK_EQ(http(d, "PUT", "/config/log_level", "Error").body, "4");
  get(d, "/info");
  CHECK_EQ(http(d, "PUT", "/config/log_level", "debug").body, "1");
  get(d, "/ping");
  EVENTUALLY(d.log().find("GET /ping") != std::string::npos);
  CHECK_EQ(d.log().find("GET /info"), std::string::npos);
  CHECK_EQ(http(d, "PUT", "/config/log_level", "loud").status, 400);
}

TEST(what_clients_call_themselves_cannot_break_the_json) {
  Process d;
  Client client(d);
  client.identify(
      "{\"client_id\":\"a\\\"b\\\\\",\"hostname\":\"<script>\\ud83d\\ude00\",\"user_agent\":"
      "\"x\\r\\ny\\u0000\xc3\x28\"}");
  client.sub("t", "c", 0);
  const std::string stats = get(d, "/stats?format=json");
  CHECK_HAS(stats, "\"client_id\":\"a\\\"b\\\\\",\"hostname\":\"\\u003cscript\\u003e\xf0\x9f\x98\x80\"");
  CHECK_EQ(stats.find('\r'), std::string::npos);
  CHECK_EQ(stats.find('\0'), std::string::npos);
}

TEST(a_page_of_another_site_can_change_nothing) {
  Process d;
  Client(d).pub("t", "x");
  for (const char* headers :
       {"Origin: http://evil.example\r\n", "Sec-Fetch-Site: cross-site\r\n", "Origin: null\r\n"}) {
    for (const char* target : {"/pub?topic=t", "/topic/delete?topic=t", "/topic/create?topic=u"}) {
      CHECK_EQ(http(d, "POST", target, "x", headers).status, 403);
    }
    CHECK_EQ(http(d, "PUT", "/config/log_level", "debug", headers).status, 403);
  }
  Http rebound(d);  // evil.example now resolves to 127.0.0.1: the browser takes it for the same site
  rebound.send(
      "POST /topic/delete?topic=t HTTP/1.1\r\nHost: evil.example:4151\r\nOrigin: http://evil.example:4151\r\n"
      "Sec-Fetch-Site: same-origin\r\nContent-Length: 0\r\n\r\n");
  CHECK_EQ(rebound.reply().status, 403);
  CHECK_EQ(http(d, "POST", "/pub?topic=t", "x", "User-Agent: curl/8\r\n").status, 200);
  CHECK_EQ(topic_count(d, "t", "depth"), 2);
}

// =====================================================================================================================
// Storage and recovery
// =====================================================================================================================

TEST(what_was_acknowledged_survives_a_kill_with_its_id_and_time) {
  Process d;
  create_channel(d, "t", "spared");
  create_channel(d, "t", "c");
  Client client(d);
  client.mpub("t", numbered("tcp", 0, 500));
  client.pub("waits", "for a channel");
  post(d, "/mpub?topic=t", "http0\nhttp1");
  client.sub("t", "c", 1);
  const Message seen = client.message();
  d.restart(SIGKILL);
  std::vector<Message> messages = drain(d, "t", "spared");
  CHECK_EQ(messages.size(), 502U);
  CHECK_EQ(messages[0].id, seen.id);
  CHECK_EQ(messages[0].timestamp, seen.timestamp);
  for (const auto& message : messages) CHECK_EQ(message.attempts, 1);
  messages = drain(d, "t", "c");
  CHECK_EQ(messages.size(), 502U);
  for (const auto& message : messages) CHECK_EQ(message.attempts, message.id == seen.id ? 2 : 1);
  CHECK_EQ(bodies_of(drain(d, "waits", "c")), Strings{"for a channel"});
}

TEST(a_message_to_a_topic_and_channel_that_are_new_survives_a_kill_at_once) {
  Process d;
  for (const auto& topic : numbered("t", 0, 15)) {
    Client client(d);
    client.sub(topic, "c", 0);
    client.pub(topic, "x");
    client.pub("alone." + topic, "x");
    d.restart();
    CHECK_EQ(channel_count(d, topic, "c", "depth"), 1);
    CHECK_EQ(topic_count(d, "alone." + topic, "depth"), 1);
  }
}

TEST(what_was_finished_does_not_come_back) {
  Process d;
  Client client(d);
  client.mpub("t", numbered("m", 0, 1000));
  client.sub("t", "c", 1000);
  std::set<std::string> left;
  for (int i = 0; i < 1000; i++) {
    const Message message = client.message();
    if (i % 3 == 0) left.insert(message.body);
    else client.fin(message);
  }
  client.pub("barrier", "all FINs before this are done");
  for (const int with : {SIGKILL, SIGTERM, SIGHUP, SIGKILL}) {  // SIGHUP ends it at once, as it does nsqd
    d.restart(with);
    EVENTUALLY(channel_count(d, "t", "c", "depth") == static_cast<int64_t>(left.size()));
  }
  const auto messages = drain(d, "t", "c");
  CHECK_EQ(set_of(bodies_of(messages)), left);
  CHECK_EQ(messages.size(), left.size());
  d.restart();
  CHECK_EQ(channel_count(d, "t", "c", "depth"), 0);
}

TEST(attempts_are_counted_over_restarts) {
  Process d;
  Client(d).pub("t", "x");
  for (int attempt = 1; attempt <= 6; attempt++) {
    Client consumer(d);
    consumer.sub("t", "c");
    const Message message = consumer.message();
    CHECK_EQ(message.attempts, attempt);
    if (attempt % 3 == 0) {  // requeued, and not only in flight
      consumer.command("RDY 0");
      consumer.req(message, 0);
      consumer.pub("barrier", "x");
    }
    d.restart(attempt % 2 == 0 ? SIGKILL : SIGTERM);
  }
}

TEST(deferred_messages_keep_their_time_over_restarts) {
  for (const int with : {SIGKILL, SIGTERM}) {
    Process d({}, folder("data" + std::to_string(with)));
    Client client(d);
    client.sub("t", "c", 1);
    client.pub("t", "requeued");
    const Message message = client.message();
    const auto start = Clock::now();
    client.req(message, 1500);
    client.dpub("t", 1200, "deferred");
    client.dpub("t", 3600000, "in an hour");
    d.restart(with);
    EVENTUALLY(channel_count(d, "t", "c", "deferred_count") == 3 || ms_since(start) > 1100);
    Client consumer(d);
    consumer.sub("t", "c", 10);
    CHECK_EQ(consumer.message().body, "deferred");
    CHECK(ms_since(start) >= 1195);
    const Message again = consumer.message();
    CHECK(ms_since(start) >= 1495);
    CHECK_EQ(again.body, "requeued");
    CHECK_EQ(again.attempts, 2);
    CHECK_EQ(channel_count(d, "t", "c", "deferred_count"), 1);
  }
}

TEST(a_pause_and_the_topics_own_wait_survive_a_kill) {
  Process d;
  create_channel(d, "t", "c");
  Client client(d);
  client.mpub("t", numbered("given", 0, 10));
  post(d, "/topic/pause?topic=t");
  client.mpub("t", numbered("kept", 0, 10));
  d.restart();
  CHECK_EQ(topic_count(d, "t", "depth"), 10);
  CHECK_EQ(channel_count(d, "t", "c", "depth"), 10);
  create_channel(d, "t", "later");
  CHECK_EQ(channel_count(d, "t", "later", "depth"), 0);
  post(d, "/topic/unpause?topic=t");
  EVENTUALLY(channel_count(d, "t", "c", "depth") == 20);
  CHECK_EQ(bodies_of(drain(d, "t", "later")), numbered("kept", 0, 10));
  d.restart();
  CHECK_EQ(channel_count(d, "t", "c", "depth"), 20);
  CHECK_EQ(channel_count(d, "t", "later", "depth"), 0);
}

TEST(an_emptied_channel_is_empty_after_a_kill) {
  Process d;
  create_channel(d, "t", "c");
  create_channel(d, "t", "other");
  Client client(d);
  client.mpub("t", numbered("m", 0, 100));
  client.dpub("t", 3600000, "deferred");
  client.mpub("u", numbered("m", 0, 100));
  post(d, "/channel/empty?topic=t&channel=c");
  post(d, "/topic/empty?topic=u");
  d.restart();
  CHECK_EQ(channel_count(d, "t", "c", "depth") + channel_count(d, "t", "c", "deferred_count"), 0);
  CHECK_EQ(channel_count(d, "t", "other", "depth") + channel_count(d, "t", "other", "deferred_count"), 101);
  CHECK_EQ(topic_count(d, "u", "depth"), 0);
}

TEST(a_log_of_many_segments_is_whole_after_a_kill_and_gone_when_consumed) {
  Process d({"--max-bytes-per-file=65536"});
  Client client(d);
  create_channel(d, "t", "c");
  Strings bodies;
  for (int i = 0; i < 400; i++)
    bodies.push_back(std::to_string(i) + std::string(static_cast<size_t>(i * 7 % 3000), 'x'));
  bodies.push_back(std::string(300000, 'y'));  // larger than a segment
  for (const auto& body : bodies) client.pub("t", body);
  CHECK(files(d.data_path, ".segment").size() >= 5);
  d.restart();
  CHECK_EQ(bodies_of(drain(d, "t", "c")), bodies);
  EVENTUALLY(files(d.data_path, "t.").size() <= 3);  // the tail, perhaps one to use again
  EVENTUALLY(files(d.data_path, "t:").size() <= 3);
  d.restart();
  CHECK_EQ(channel_count(d, "t", "c", "depth"), 0);
}

TEST(a_segment_that_is_used_again_shows_nothing_of_its_past) {
  Process d({"--max-bytes-per-file=262144"});
  create_channel(d, "t", "c");
  for (int round = 0; round < 6; round++) {
    const Strings first = numbered("first" + std::to_string(round) + std::string(200, '.'), 0, 4000);
    Client(d).mpub("t", first);
    CHECK_EQ(bodies_of(drain(d, "t", "c")), first);
    const Strings second = numbered("second" + std::to_string(round), 0, 100 * round);
    if (round > 0) Client(d).mpub("t", second);
    d.restart(round % 2 == 0 ? SIGTERM : SIGKILL);
    CHECK_EQ(bodies_of(drain(d, "t", "c")), second);
  }
}

TEST(large_segments_are_used_again_and_a_kill_finds_them_whole) {
  Process d;
  create_channel(d, "t", "c");
  int published = 0;
  const auto publish_more = [&](int count) {
    const std::string large(100000, 'x');
    Client client(d);
    for (const auto& body : numbered(large, published, published + count)) client.pub("t", body);
    published += count;
  };
  bool used_again = false;
  for (int round = 0; round < 8; round++) {
    publish_more(60);
    used_again = used_again || !files(d.data_path, ".spare").empty();
    CHECK_EQ(drain(d, "t", "c").size(), 60U);
  }
  CHECK(used_again);
  publish_more(100);
  d.restart();
  CHECK(files(d.data_path, ".spare").empty());
  CHECK_EQ(sorted(bodies_of(drain(d, "t", "c"))), sorted(numbered(std::string(100000, 'x'), published - 100, published)));
}

TEST(one_message_that_is_never_finished_holds_only_its_own_segment) {
  Process d({"--max-bytes-per-file=65536"});
  Client holder(d), client(d), consumer(d);
  client.pub("t", "held");
  holder.sub("t", "c", 1);
  CHECK_EQ(holder.message().body, "held");
  consumer.sub("t", "c", 300);
  for (int round = 0; round < 3; round++) {
    client.mpub("t", Strings(300, std::string(1000, 'x')));
    for (int i = 0; i < 300; i++) consumer.fin(consumer.message());
  }
  EVENTUALLY(channel_count(d, "t", "c", "in_flight_count") == 1);
  EVENTUALLY(files(d.data_path, ".segment").size() <= 4);
  d.restart();
  CHECK_EQ(bodies_of(drain(d, "t", "c")), Strings{"held"});
}

TEST(a_backlog_does_not_stay_in_memory) {
  Process d({"--max-bytes-per-file=1048576"});
  Client client(d);
  create_channel(d, "t", "c");
  needs_memory_figures(d);
  const int64_t before = memory_kb(d);
  for (int i = 0; i < 20; i++) client.mpub("t", Strings(5000, std::string(200, 'x')));
  CHECK_EQ(channel_count(d, "t", "c", "depth"), 100000);
  EVENTUALLY(channel_count(d, "t", "c", "backend_depth") > 50000);
  CHECK(memory_kb(d) - before < 6000);
  CHECK(proc_status(d.pid(), "RssFile") < 15000);
  d.restart();
  CHECK_EQ(drain(d, "t", "c").size(), 100000U);
}

TEST(files_that_are_not_its_own_are_left_alone) {
  const std::string data = folder("data");
  for (const char* name :
       {"README", "x.segment", "t.00000000000000000000.segment.bak", "tc.ledger", "nsqd.dat.1234.tmp"}) {
    write_file(data + "/" + name, "not yours");
  }
  Process d;
  Client(d).pub("t", "x");
  d.restart();
  CHECK_EQ(drain(d, "t", "c").size(), 1U);
  for (const char* name : {"README", "x.segment", "t.00000000000000000000.segment.bak"})
    CHECK_EQ(read_file(data + "/" + name), "not yours");
}

// ---- Killed at full speed

// Publishes until the connection ends; returns what was acknowledged.
Strings publish_until_it_ends(const Ports& daemon, const std::string& prefix) {
  Strings acknowledged;
  try {
    Client client(daemon);
    for (int n = 0;; n += 40) {
      std::string all, batch = be32(20);
      for (const auto& body : numbered(prefix, n, n + 20)) all += "PUB t\n" + be32(body.size()) + body;
      for (const auto& body : numbered(prefix, n + 20, n + 40)) batch += be32(body.size()) + body;
      client.send(all + "MPUB t\n" + be32(batch.size()) + batch);
      for (int i = 0; i <= 20; i++) {
        client.expect("OK");
        for (const auto& body : numbered(prefix, n + i, n + (i < 20 ? i + 1 : 40))) acknowledged.push_back(body);
      }
    }
  } catch (const Failed&) {
    return acknowledged;
  }
}

struct Consumed {
  std::unordered_set<std::string> received;  // its message came
  std::unordered_set<std::string>
      finished;  // the daemon has done its FIN: it answered a command that was sent after it
};

Consumed consume_until_it_ends(const Ports& daemon) {
  Consumed all;
  try {
    Client client(daemon);
    client.sub("t", "a", 500);
    Strings sent, under_way;
    while (const auto frame = client.frame()) {
      if (frame->type == 0) all.finished.insert(under_way.begin(), under_way.end()), under_way.clear();
      if (frame->type != 2) continue;
      const Message message = Client::parse(frame->data);
      all.received.insert(message.body);
      client.fin(message);
      sent.push_back(message.body);
      if (sent.size() < 50 || !under_way.empty()) continue;
      under_way.swap(sent);
      client.command("PUB barrier#ephemeral", "x");
    }
  } catch (const Failed&) {}
  return all;
}

// One round: two publishers and two consumers at full speed, the end, a start; then all that is left is looked at.
void kill_round(Process& d, int round, const std::vector<int>& signals, int line) {
  const std::string prefix = std::to_string(round) + ".";
  std::vector<std::future<Strings>> publishers;
  std::vector<std::future<Consumed>> consumers;
  const Ports ports = d;
  for (const char* name : {"p.", "q."})
    publishers.push_back(std::async(std::launch::async, publish_until_it_ends, ports, prefix + name));
  for (int i = 0; i < 2; i++) consumers.push_back(std::async(std::launch::async, consume_until_it_ends, ports));
  std::this_thread::sleep_for(std::chrono::microseconds(30000 + (now_ns() / 1000) % 300000));  // a random moment
  for (const int number : signals) d.signal(number);
  const int status = d.wait(line);
  if (signals.back() == SIGTERM && status != 0) fail(line, "ended with " + std::to_string(status));
  Strings acknowledged;
  for (auto& publisher : publishers)
    for (auto& body : publisher.get()) acknowledged.push_back(std::move(body));
  Consumed before;
  for (auto& consumer : consumers) {
    Consumed some = consumer.get();
    before.received.merge(some.received);
    before.finished.merge(some.finished);
  }
  d.start(line);
  std::map<std::string, int> a, b;
  int duplicates = 0, unborn = 0;
  for (const auto& message : drain(d, "t", "a", line)) {
    if (before.finished.count(message.body) != 0) fail(line, message.body + " was finished and came again");
    if (a[message.body]++ != 0) fail(line, message.body + " came twice after the restart");
    if (before.received.count(message.body) != 0) duplicates++, unborn += message.attempts < 2;
  }
  for (const auto& message : drain(d, "t", "b", line))
    if (b[message.body]++ != 0) fail(line, message.body + " came twice to b");
  if (unborn != 0) fail(line, std::to_string(unborn) + " messages that came before have attempts 1");
  for (const auto& body : acknowledged) {
    if (b.count(body) == 0) fail(line, body + " was acknowledged and is lost to the channel without consumer");
    if (a.count(body) == 0 && before.received.count(body) == 0)
      fail(line, body + " was acknowledged and is lost to the channel with consumers");
  }
  std::printf("%zu acknowledged, %zu received, %zu finished, %d again\n", acknowledged.size(), before.received.size(),
              before.finished.size(), duplicates);
}

void kill_rounds(const std::vector<int>& signals, int line = __builtin_LINE()) {
  Process d;
  create_channel(d, "t", "a");
  create_channel(d, "t", "b");
  const int rounds = static_cast<int>(number_from_environment("KILL_ROUNDS", 3));
  for (int round = 0; round < rounds; round++) kill_round(d, round, signals, line);
}

TEST(nothing_acknowledged_is_lost_when_it_is_killed_at_full_speed) { kill_rounds({SIGKILL}); }
TEST(nothing_acknowledged_is_lost_when_it_is_stopped_at_full_speed) { kill_rounds({SIGTERM}); }
TEST(nothing_acknowledged_is_lost_when_it_is_frozen_and_killed) { kill_rounds({SIGSTOP, SIGKILL}); }

// ---- Damaged files

constexpr int kMessages = 8;
const std::string kBody = "the body of message ";

// A data folder with kMessages in topic t for channel c, as a daemon leaves it; with the places of the messages.
struct Stored {
  std::string folder, segment, bytes;             // the segment file's name and content
  std::vector<std::pair<size_t, size_t>> frames;  // [from, to) of each message in it
  size_t slots = 0;                               // where the slots at its end begin
};

Stored store_messages() {
  Stored stored;
  stored.folder = folder("whole");
  {
    Local d(stored.folder);
    d->create_channel("t", "c");
    for (const auto& body : numbered(kBody, 0, kMessages)) d->publish("t", body);
    d->stop();
  }
  const Strings segments = files(stored.folder, ".segment");
  CHECK_EQ(segments.size(), 1U);
  stored.segment = segments[0];
  stored.bytes = read_file(stored.folder + "/" + stored.segment);
  for (const auto& body : numbered(kBody, 0, kMessages)) {
    const size_t at = stored.bytes.find(body);
    CHECK(at != std::string::npos);
    stored.frames.emplace_back(at - 34, at + body.size());  // size, type, timestamp, attempts and id before it
  }
  stored.slots = stored.bytes.size();
  while (stored.slots > stored.frames.back().second &&
         stored.bytes.find_last_not_of('\0', stored.slots - 1) + 8 >= stored.slots) {
    stored.slots--;
  }
  return stored;
}

// Starts a daemon on a copy with other bytes in the file `name`; the bodies that it delivers, or nothing when it refuses
// to start: then with a reason that names the file, and with the file as it was.
std::optional<Strings> delivered_from(const Stored& stored, const std::string& name, const std::string& bytes,
                                      int line = __builtin_LINE()) {
  const std::string copy = copy_of(stored.folder, "damaged");
  write_file(copy + "/" + name, bytes);
  nsqd::Options options = local_options(copy);
  options.log = [](std::string_view) {};
  try {
    Local d(options);
    nsqd::Subscription consumer = d->subscribe("t", "c", kMessages);
    Strings out;
    const auto waiting = [&] { return d->stats().topics.at(0).channels.at(0).depth; };
    for (const auto end = Clock::now() + patience(); Clock::now() < end;) {
      if (const auto message = consumer.next(1ms)) out.push_back(message->body);
      else if (waiting() == 0 && d->stats().topics[0].channels[0].in_flight_count == static_cast<int64_t>(out.size()))
        break;
    }
    if (waiting() != 0) fail(line, "a message is counted but does not come");
    for (const auto& body : out)
      if (set_of(numbered(kBody, 0, kMessages)).count(body) == 0) fail(line, "a damaged message came: " + show(body));
    if (set_of(out).size() != out.size()) fail(line, "a message came twice");
    return out;
  } catch (const std::runtime_error& refused) {
    if (dynamic_cast<const Failed*>(&refused) != nullptr) throw;
    if (std::string(refused.what()).find(name) == std::string::npos)
      fail(line, "does not name the file: " + std::string(refused.what()));
    if (read_file(copy + "/" + name) != bytes) fail(line, "refuses the file and yet changes it");
    return {};
  }
}

// What is left of the messages when those in [from, to) are damaged.
Strings untouched(const Stored& stored, size_t from, size_t to) {
  Strings out;
  for (size_t i = 0; i < kMessages; i++) {
    if (stored.frames[i].second <= from || stored.frames[i].first >= to) out.push_back(kBody + std::to_string(i));
  }
  return out;
}

TEST(a_flipped_byte_of_a_record_costs_that_record_only) {
  const Stored stored = store_messages();
  for (size_t at = stored.frames[kMessages - 3].first; at < stored.frames.back().second + 16; at++) {
    std::string bytes = stored.bytes;
    bytes[at] = static_cast<char>(bytes[at] ^ (at % 2 == 0 ? 0xff : 0x01));
    const auto got = delivered_from(stored, stored.segment, bytes);
    if (!got || sorted(*got) != untouched(stored, at, at + 1))
      fail(__LINE__, "byte " + std::to_string(at) + " leaves " + show(got.value_or(Strings{"refused"})));
  }
}

TEST(a_flipped_byte_of_a_header_is_harmless_or_refused) {
  const Stored stored = store_messages();
  for (size_t at = 0; at < stored.frames[0].first; at++) {
    for (const int mask : {0x01, 0xff}) {
      std::string bytes = stored.bytes;
      bytes[at] = static_cast<char>(bytes[at] ^ mask);
      const auto got = delivered_from(stored, stored.segment, bytes);
      if (got && got->size() != kMessages) fail(__LINE__, "byte " + std::to_string(at) + " leaves " + show(*got));
    }
  }
}

TEST(a_flipped_byte_of_a_slot_costs_at_most_its_record) {
  const Stored stored = store_messages();
  for (size_t at = stored.slots; at < stored.bytes.size(); at++) {
    std::string bytes = stored.bytes;
    bytes[at] = static_cast<char>(bytes[at] ^ 0x11);
    const auto got = delivered_from(stored, stored.segment, bytes);
    if (got && got->size() + 1 < kMessages) fail(__LINE__, "byte " + std::to_string(at) + " leaves " + show(*got));
  }
}

TEST(pages_that_never_reached_the_disk_cost_only_what_was_in_them) {
  const Stored stored = store_messages();
  const size_t end = stored.frames.back().second;
  for (size_t from = stored.frames[kMessages - 3].first; from < end; from += 3) {
    std::string bytes = stored.bytes;
    std::fill(bytes.begin() + static_cast<std::ptrdiff_t>(from), bytes.begin() + static_cast<std::ptrdiff_t>(end),
              '\0');
    const auto got = delivered_from(stored, stored.segment, bytes);
    if (!got || sorted(*got) != untouched(stored, from, end))
      fail(__LINE__, "zeros from " + std::to_string(from) + " leave " + show(got.value_or(Strings{"refused"})));
  }
  for (size_t to = stored.slots; to < stored.bytes.size(); to += 3) {  // the slots grow downwards
    std::string bytes = stored.bytes;
    std::fill(bytes.begin() + static_cast<std::ptrdiff_t>(stored.slots),
              bytes.begin() + static_cast<std::ptrdiff_t>(to), '\0');
    delivered_from(stored, stored.segment, bytes);
  }
}

TEST(a_segment_that_was_cut_or_overwritten_is_refused_or_read_but_never_spoilt) {
  const Stored stored = store_messages();
  for (size_t size = 0; size < stored.bytes.size(); size += size < 1000 ? 97 : stored.bytes.size() / 7) {
    delivered_from(stored, stored.segment, stored.bytes.substr(0, size));
  }
  delivered_from(stored, stored.segment, std::string(stored.bytes.size(), '\0'));
  delivered_from(stored, stored.segment, stored.bytes + std::string(4096, 'x'));
  const auto cut = delivered_from(stored, stored.segment, stored.bytes.substr(0, stored.bytes.size() - 4096));
  CHECK(!cut);
}

TEST(a_file_whose_making_was_cut_short_is_no_trouble) {
  const Stored stored = store_messages();
  std::string next = std::to_string(std::stoull(stored.segment.substr(2, 20)) + kMessages);
  next.insert(0, 20 - next.size(), '0');
  for (const size_t size : {size_t{0}, size_t{1}, size_t{4096}, stored.bytes.size()}) {
    for (const auto& name : {"t." + next + ".segment", std::string("t:c.ledger")}) {
      const auto got = delivered_from(stored, name, std::string(size, '\0'));
      if (!got || got->size() != kMessages)
        fail(__LINE__, name + " with " + std::to_string(size) + " zeros is refused");
    }
  }
}

TEST(files_of_a_later_version_are_refused_and_left_as_they_are) {
  const Stored stored = store_messages();
  for (const auto& name : files(stored.folder)) {
    if (name == "nsqd.dat") continue;
    std::string bytes = read_file(stored.folder + "/" + name);
    bytes[12]++;  // the version; the checksum of the header is behind it
    const uint32_t sum = nsqd::detail::checksum(0, bytes.data(), 32);
    std::memcpy(bytes.data() + 32, &sum, sizeof sum);
    CHECK(!delivered_from(stored, name, bytes));
  }
}

TEST(a_record_that_is_no_message_is_left_out_even_if_its_checksum_fits) {
  const Stored stored = store_messages();
  std::string bytes = stored.bytes;
  const size_t slot = bytes.size() - 8;  // of the first record
  uint32_t at = 0;
  std::memcpy(&at, &bytes[slot], sizeof at);
  bytes[at + 7]++;  // the type of its frame
  const uint32_t sum = nsqd::detail::Segment::sum(std::stoull(stored.segment.substr(2, 20)), &bytes[at], 0);
  CHECK(std::memcmp(&bytes[slot + 4], &sum, sizeof sum) == 0);
  const auto got = delivered_from(stored, stored.segment, bytes);
  CHECK(got && got->size() == kMessages - 1);
}

TEST(a_damaged_ledger_never_costs_a_message_its_body) {
  const Stored stored = store_messages();
  {
    Local d(stored.folder);
    const nsqd::Subscription consumer = d->subscribe("t", "c", 3);  // three in slots, five behind the cursor
    EVENTUALLY(d->stats().topics.at(0).channels.at(0).in_flight_count == 3);
    d->stop();
  }
  const std::string whole = read_file(stored.folder + "/t:c.ledger");
  const auto damaged = [&](const std::string& bytes, const std::string& how) {
    const auto got = delivered_from(stored, "t:c.ledger", bytes);
    if (!got || got->size() != kMessages) fail(__LINE__, how + " leaves " + show(got.value_or(Strings{"refused"})));
  };
  const auto is_byte_of_a_time = [](size_t at) { return at >= 96 && at % 32 >= 8; };  // of due and attempts, and unused
  for (size_t at = 36; at < 96 + 4 * 32; at++) {
    for (const int mask : {0x01, 0xff}) {
      std::string bytes = whole;
      bytes[at] = static_cast<char>(bytes[at] ^ mask);
      if (!is_byte_of_a_time(at)) damaged(bytes, "byte " + std::to_string(at));
    }
  }
  for (size_t at = 0; at < 36; at++) {
    std::string bytes = whole;
    bytes[at] = static_cast<char>(bytes[at] ^ 0xff);
    damaged(bytes, "byte " + std::to_string(at));
  }
  for (size_t size = 0; size < whole.size(); size += 1 + whole.size() / 9) damaged(whole.substr(0, size), "cutting it");
}

// =====================================================================================================================
// Full disk
// =====================================================================================================================

// A file system of a few MiB, seen by this test only.
std::string small_disk(int mib) {
  const std::string path = folder("disk");
#ifdef __linux__
  const std::string size = "size=" + std::to_string(mib) + "m";
  if (unshare(CLONE_NEWNS) == 0 && mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
      mount("none", path.c_str(), "tmpfs", 0, size.c_str()) == 0) {
    return path;
  }
#endif
  throw Skipped("may not mount a small file system of " + std::to_string(mib) + " MiB");
}

// Publishes messages of 10 kB, each on a connection that an error may end, until one fails. Adds what was acknowledged.
std::string publish_until_it_fails(const Ports& daemon, Strings& acknowledged) {
  Client client(daemon);
  for (;;) {
    const std::string body = std::to_string(acknowledged.size()) + std::string(10000, 'x');
    client.command("PUB t", body);
    const auto answer = client.frame();
    if (!answer || answer->type != 0) return answer ? answer->data : "nothing";
    acknowledged.push_back(body);
    if (acknowledged.size() > 5000) return "it never failed";
  }
}

TEST(a_full_disk_fails_publishes_and_nothing_else) {
  Process d({}, small_disk(4));
  create_channel(d, "t", "c");
  write_file(d.data_path + "/ballast", std::string(1 << 20, 'b'));
  Strings acknowledged;
  CHECK_HAS(publish_until_it_fails(d, acknowledged), "E_PUB_FAILED PUB failed ");
  CHECK(!acknowledged.empty());
  CHECK_EQ(http(d, "POST", "/pub?topic=t", std::string(100000, 'x')).status, 503);
  const Reply ping = http(d, "GET", "/ping");
  CHECK_EQ(ping.status, 500);
  CHECK_HAS(ping.body, "NOK - ");
  CHECK_HAS(get(d, "/stats?format=json"), "\"health\":\"NOK - ");
  Client consumer(d);
  consumer.sub("t", "c", 1);
  const Message first = consumer.message();  // consumers go on
  CHECK_EQ(first.body, acknowledged[0]);
  consumer.req(first, 0);
  consumer.fin(consumer.message());
  std::filesystem::remove(d.data_path + "/ballast");
  Client(d).pub("t", "there is room again");
  CHECK_EQ(get(d, "/ping"), "OK");
  consumer.close();
  d.restart();
  CHECK(drain(d, "t", "c").size() >= acknowledged.size());
}

TEST(consuming_makes_room_on_a_full_disk) {
  Process d({"--max-bytes-per-file=262144"}, small_disk(4));
  create_channel(d, "t", "c");
  for (int round = 0; round < 3; round++) {
    Strings acknowledged;
    CHECK_HAS(publish_until_it_fails(d, acknowledged), "E_PUB_FAILED");
    CHECK(acknowledged.size() > 100);
    if (round == 1) d.restart();
    CHECK_EQ(set_of(bodies_of(drain(d, "t", "c"))), set_of(acknowledged));
  }
  Client(d).pub("t", "x");
  CHECK_EQ(get(d, "/ping"), "OK");
}

TEST(on_a_full_disk_what_is_requeued_comes_again_though_a_backlog_waits) {
  Process d({}, small_disk(1));
  create_channel(d, "t", "c");
  Client(d).mpub("t", numbered("m", 0, 300));
  std::ofstream ballast(d.data_path + "/ballast");
  while (ballast << std::string(1000, 'b') << std::flush) continue;
  Client consumer(d);
  consumer.sub("t", "c", 200);
  std::vector<Message> held;
  while (const auto message = consumer.try_message(500ms)) held.push_back(*message);
  CHECK(held.size() >= 50 && held.size() < 200);  // as many as the ledger has room for
  for (const auto& message : held) consumer.req(message, 0);
  for (auto& message : held) {  // a finished one would make room for the backlog, so none is finished yet
    message = consumer.message();
    CHECK_EQ(message.attempts, 2);
  }
  Strings finished;
  for (const auto& message : held) consumer.fin(message), finished.push_back(message.body);
  for (size_t left = 300 - held.size(); left > 0; left--) {
    const Message message = consumer.message();
    finished.push_back(message.body);
    consumer.fin(message);
  }
  CHECK_EQ(sorted(finished), sorted(numbered("m", 0, 300)));
}

TEST(files_that_are_removed_hold_space_and_descriptors_only_for_a_while) {
  nsqd::detail::RemovedFiles removed;
  std::vector<int> numbers;
  for (size_t i = 0; i < removed.kMost + 10; i++) {
    nsqd::detail::MappedFile file(folder("data") + "/x", 4096);
    nsqd::detail::Storage storage;
    CHECK(file.create(storage).ok());
    nsqd::detail::Fd left = file.remove();
    numbers.push_back(left.get());
    removed.add(std::move(left));
  }
  const auto open_ones = [&] {
    return std::count_if(numbers.begin(), numbers.begin() + removed.kMost, [](int n) { return fcntl(n, F_GETFD) >= 0; });
  };
  CHECK_EQ(files(folder("data")).size(), 0U);
  CHECK_EQ(open_ones(), static_cast<std::ptrdiff_t>(removed.kMost));
  for (size_t i = removed.kMost; i < numbers.size(); i++) CHECK(fcntl(numbers[i], F_GETFD) < 0);  // freed at once
  CHECK(removed.more());
  CHECK(!removed.more());
  removed.close();
  CHECK_EQ(open_ones(), 0);
}

TEST(a_disk_that_is_full_at_the_start_or_for_metadata_is_said_and_survived) {
  Process d({}, small_disk(1));
  Client(d).pub("t", "x");
  EVENTUALLY(read_file(d.data_path + "/nsqd.dat").find("\"t\"") != std::string::npos);
  {
    std::ofstream ballast(d.data_path + "/ballast");
    while (ballast << std::string(1000, 'b') << std::flush) continue;
  }
  post(d, "/topic/create?topic=u");  // kept in memory
  CHECK_HAS(get(d, "/stats?format=json"), "\"topic_name\":\"u\"");
  EVENTUALLY(d.log().find("ERROR") != std::string::npos);
  std::filesystem::remove(d.data_path + "/ballast");
  post(d, "/topic/create?topic=v");
  EVENTUALLY(read_file(d.data_path + "/nsqd.dat").find("\"v\"") != std::string::npos);
  d.restart();
  for (const char* topic : {"t", "u", "v"}) CHECK(topic_count(d, topic, "depth") >= 0);
  CHECK_EQ(drain(d, "t", "c").size(), 1U);
}

// Files may grow up to `bytes` from now on: what goes beyond fails, as on a disk that is full.
void limit_files(rlim_t bytes) {
  signal(SIGXFSZ, SIG_IGN);
  rlimit limit{};
  getrlimit(RLIMIT_FSIZE, &limit);
  limit.rlim_cur = std::min(bytes, limit.rlim_max);
  if (setrlimit(RLIMIT_FSIZE, &limit) != 0) throw Skipped("cannot limit the size of files");
}

TEST(wherever_a_write_fails_nothing_acknowledged_is_lost) {
  for (rlim_t bytes = 0; bytes <= 16 << 20; bytes = bytes == 0 ? 512 : 2 * bytes) {
    const std::string data = folder("data." + std::to_string(bytes));
    Strings acknowledged;
    bool failed = false;
    {
      nsqd::Options options = local_options(data);
      options.max_bytes_per_file = 8 << 20;
      options.log = [](std::string_view) {};
      Local d(options);
      limit_files(bytes);
      try {
        for (int i = 0; i < 1000; i++) {
          const Strings batch = numbered(std::to_string(i) + std::string(10000, '.'), 0, 3);
          d->publish("t", batch);
          acknowledged.insert(acknowledged.end(), batch.begin(), batch.end());
        }
      } catch (const std::runtime_error&) {
        failed = true;
        CHECK_HAS(d->stats().health, "NOK - ");
      }
      limit_files(RLIM_INFINITY);
      d->publish("t", "it works again");
      CHECK_EQ(d->stats().health, "OK");
    }
    CHECK(failed || bytes > 4 << 20);
    const std::set<std::string> got = set_of(bodies_of(drain(Local(data), "t", "c")));
    for (const auto& body : acknowledged) CHECK(got.count(body) == 1);
    CHECK(got.count("it works again") == 1);
    std::filesystem::remove_all(data);
  }
}

// =====================================================================================================================
// Sync
// =====================================================================================================================

// How many kB of the maps of files in `path` are changed and not yet on the disk.
int64_t dirty_kb(pid_t pid, const std::string& path) {
  std::istringstream maps(read_file("/proc/" + std::to_string(pid) + "/smaps"));
  int64_t sum = 0;
  bool ours = false;
  for (std::string line; std::getline(maps, line);) {
    if (line.find('-') < line.find(':')) ours = line.find(path + "/") != std::string::npos;
    if (ours && line.find("_Dirty:") != std::string::npos && line.find("Pss") == std::string::npos) {
      sum += std::atoll(line.c_str() + line.find(':') + 1);
    }
  }
  return sum;
}

void needs_dirty_pages(const Process& d) {
  Client(d).pub("probe", "x");
  const auto end = Clock::now() + 1s;
  while (dirty_kb(d.pid(), d.data_path) == 0)
    if (Clock::now() > end) throw Skipped("this file system does not tell what is dirty");
}

TEST(with_sync_every_1_an_ok_comes_after_the_sync) {
  {
    Process probe({"--sync-every=1000000", "--sync-timeout=1h"}, folder("probe"));
    needs_dirty_pages(probe);
  }
  Process d({"--sync-every=1", "--sync-timeout=1h"});
  Client client(d);
  for (int i = 0; i < 20; i++) {
    client.pub("t", std::string(3000, 'x'));
    CHECK_EQ(dirty_kb(d.pid(), d.data_path), 0);
    post(d, "/pub?topic=t", "http");
    CHECK_EQ(dirty_kb(d.pid(), d.data_path), 0);
  }
}

TEST(sync_timeout_brings_all_to_the_disk) {
  Process d({"--sync-every=1000000", "--sync-timeout=300ms"});
  Client client(d);
  needs_dirty_pages(d);
  client.mpub("t", Strings(100, std::string(3000, 'x')));
  EVENTUALLY(dirty_kb(d.pid(), d.data_path) == 0);
}

TEST(sync_every_brings_all_to_the_disk) {
  Process d({"--sync-every=100", "--sync-timeout=1h"});
  Client client(d);
  needs_dirty_pages(d);
  EVENTUALLY((client.mpub("t", Strings(100, "x")), dirty_kb(d.pid(), d.data_path) == 0));
}

// After a power cut a page of a file holds what it held at the last sync, or at any moment since; one that is new may hold
// zeros. `seed` chooses for each.
void cut_power(const std::string& synced, const std::string& later, const std::string& result, unsigned seed) {
  std::filesystem::create_directories(result);
  for (const auto& name : files(later)) {
    const std::string fresh = read_file(later + "/" + name);
    std::string out = exists(synced + "/" + name) ? read_file(synced + "/" + name) : std::string();
    out.resize(fresh.size(), '\0');
    for (size_t at = 0; at < fresh.size(); at += 4096) {
      seed = seed * 1664525 + 1013904223;
      if (seed >> 31 != 0) out.replace(at, 4096, fresh, at, 4096);
    }
    if (name.find(".segment") == std::string::npos && name.find(".ledger") == std::string::npos) out = fresh;
    if (name.find(".ledger") != std::string::npos) out[56]++;  // the machine's run: it is another one afterwards
    write_file(result + "/" + name, out);
  }
}

TEST(after_a_power_cut_all_that_was_synced_is_there) {
  const std::string data = folder("data"), dots(500, '.'), ledger = "/t:c.ledger";
  nsqd::Options options = local_options(data);
  options.sync_every = 1000000;
  options.sync_timeout = 700ms;  // long enough for what comes after the sync
  std::string synced, later;
  std::set<std::string> finished;
  const auto safe = [&](const std::string& path) { return read_file(path + ledger).substr(48, 8); };
  for (int tries = 0; later.empty() || safe(later) != safe(synced); tries++) {
    CHECK(tries < 10);
    std::filesystem::remove_all(data);
    folder("data");
    finished.clear();
    Local d(options);
    d->create_channel("t", "c");
    for (const auto& body : numbered("synced" + dots, 0, 500)) d->publish("t", body);
    nsqd::Subscription consumer = d->subscribe("t", "c", 300);  // their slots are on several pages
    std::vector<nsqd::Message> held;
    while (held.size() < 300) held.push_back(consumer.next(patience()).value());
    EVENTUALLY(safe(data) == read_file(data + ledger).substr(40, 8));
    synced = copy_of(data, "synced" + std::to_string(tries));
    for (const auto& body : numbered("later" + dots, 0, 60)) d->publish("t", body);
    for (size_t i = 0; i < 250; i++) {
      finished.insert(held[i * 7 % 300].body);
      CHECK(consumer.finish(held[i * 7 % 300]));
    }
    for (int i = 0; i < 250; i++) CHECK(consumer.next(patience()));  // they come into the slots of those
    later = copy_of(data, "later" + std::to_string(tries));
  }
  for (unsigned seed = 0; seed < 40; seed++) {
    const std::string left = g_folder + "/left";
    std::filesystem::remove_all(left);
    cut_power(synced, later, left, seed);
    nsqd::Options quiet = local_options(left);
    quiet.log = [](std::string_view) {};
    const Strings got = bodies_of(drain(Local(quiet), "t", "c"));
    CHECK_EQ(set_of(got).size(), got.size());
    int missing = 0;
    for (const auto& body : numbered("synced" + dots, 0, 500))
      missing += finished.count(body) == 0 && set_of(got).count(body) == 0;
    CHECK_EQ(missing, 0);
    for (const auto& body : got) CHECK(body.size() > 500 && body.find(dots) != body.npos);
  }
}

// =====================================================================================================================
// Import of the disk queues of nsqd
// =====================================================================================================================

std::string disk_record(const std::string& id, int64_t timestamp, int attempts, const std::string& body) {
  return be32(26 + body.size()) + be(static_cast<uint64_t>(timestamp), 8) + be(static_cast<uint64_t>(attempts), 2) +
         id + body;
}
// Records whose id, timestamp and attempts follow from their number. A topic's own have been delivered to nobody yet.
std::string disk_records(const std::string& prefix, int from, int to) {
  std::string out;
  for (int i = from; i < to; i++) {
    const std::string number = std::to_string(i), id = std::string(16 - number.size(), '0') + number;
    out += disk_record(id, 1700000000000000000 + i, prefix == "topic" ? 0 : i % 3, prefix + number);
  }
  return out;
}
void write_metadata(const std::string& data, const std::string& queue, int depth, size_t read, int file, size_t write,
                    int first = 0) {
  std::ostringstream text;
  text << depth << "\n" << first << "," << read << "\n" << file << "," << write << "\n";
  write_file(data + "/" + queue + ".diskqueue.meta.dat", text.str());
}
void write_nsqd_dat(const std::string& data) {
  write_file(data + "/nsqd.dat",
             "{\"topics\":[{\"name\":\"t\",\"paused\":false,\"channels\":[{\"name\":\"c\",\"paused\":false}]}],"
             "\"version\":\"1.3.0\"}");
}
void check_imported(const std::vector<Message>& messages, const std::string& prefix, int from, int to,
                    int line = __builtin_LINE()) {
  check_eq(sorted(bodies_of(messages)), sorted(numbered(prefix, from, to)), "the bodies", line);
  for (const auto& message : messages) {
    const int64_t i = std::atoll(message.id.c_str());
    check_eq(message.timestamp, 1700000000000000000 + i, "the timestamp", line);
    check_eq(message.attempts, prefix == "topic" ? 1 : i % 3 + 1, "the attempts", line);
    check_eq(message.body, prefix + std::to_string(i), "the id", line);
  }
}

TEST(the_queues_of_a_stopped_nsqd_are_taken_over_once) {
  const std::string data = folder("data");
  const std::string consumed = disk_records("m", 0, 3), records = consumed + disk_records("m", 3, 20);
  write_nsqd_dat(data);
  write_file(data + "/t:c.diskqueue.000000.dat", records);
  write_metadata(data, "t:c", 17, consumed.size(), 0, records.size());
  const std::string waiting = disk_records("topic", 0, 5);
  write_file(data + "/waits.diskqueue.000000.dat", waiting);  // a topic without channels
  write_metadata(data, "waits", 5, 0, 0, waiting.size());
  std::string dat = read_file(data + "/nsqd.dat");
  write_file(data + "/nsqd.dat",
             dat.replace(dat.find("],\"version\""), 1, ",{\"name\":\"waits\",\"paused\":false,\"channels\":null}]"));
  Process d;
  CHECK_EQ(channel_count(d, "t", "c", "depth"), 17);
  CHECK_EQ(topic_count(d, "waits", "depth"), 5);
  CHECK_EQ(files(data, "diskqueue"), Strings{});
  d.restart();
  check_imported(drain(d, "t", "c"), "m", 3, 20);
  check_imported(drain(d, "waits", "x"), "topic", 0, 5);
}

TEST(a_topics_queue_goes_to_its_channels_and_a_channels_queue_to_it_alone) {
  const std::string data = folder("data");
  write_nsqd_dat(data);
  const std::string of_topic = disk_records("topic", 10, 15), of_channel = disk_records("channel", 0, 10);
  write_file(data + "/t.diskqueue.000000.dat", of_topic);
  write_metadata(data, "t", 5, 0, 0, of_topic.size());
  write_file(data + "/t:c.diskqueue.000000.dat", of_channel);
  write_metadata(data, "t:c", 10, 0, 0, of_channel.size());
  Process d;
  create_channel(d, "t", "late");
  EVENTUALLY(channel_count(d, "t", "c", "depth") == 15);
  auto messages = drain(d, "t", "c");
  std::sort(messages.begin(), messages.end(), [](const Message& a, const Message& b) { return a.id < b.id; });
  check_imported({messages.begin(), messages.begin() + 10}, "channel", 0, 10);
  check_imported({messages.begin() + 10, messages.end()}, "topic", 10, 15);
  CHECK_EQ(channel_count(d, "t", "late", "depth"), 0);
}

TEST(a_queue_of_several_files_a_metadata_file_that_is_behind_and_a_torn_record_are_no_trouble) {
  const std::string data = folder("data");
  write_nsqd_dat(data);
  const std::string behind = disk_records("m", 20, 23), torn = disk_record("00000000000000ff", 1, 0, "torn");
  write_file(data + "/t:c.diskqueue.000003.dat", disk_records("m", 0, 10));
  write_file(data + "/t:c.diskqueue.000004.dat", disk_records("m", 10, 20));
  write_file(data + "/t:c.diskqueue.000005.dat", behind + disk_records("m", 23, 30) + torn.substr(0, torn.size() - 2));
  write_metadata(data, "t:c", 23, 0, 5, behind.size(), 3);
  Process d;
  check_imported(drain(d, "t", "c"), "m", 0, 30);
  d.restart();
  CHECK_EQ(channel_count(d, "t", "c", "depth"), 0);
}

TEST(a_disk_queue_that_belongs_to_nothing_stays_and_one_without_its_metadata_is_taken_whole) {
  const std::string data = folder("data"), records = disk_records("m", 0, 5);
  for (const char* queue : {"t#ephemeral", "not valid", "t:c", "t:d"}) {
    write_file(data + "/" + queue + ".diskqueue.000000.dat", records);
    if (queue != std::string("t:c")) write_metadata(data, queue, 5, 0, 0, records.size());
  }
  write_file(data + "/t:d.diskqueue.meta.dat", "five\n0\n");
  Process d;
  for (const char* name : {"t#ephemeral", "not valid", "t:c", "t:d"}) CHECK_HAS(d.log(), name);
  CHECK_EQ(files(data, "diskqueue").size(), 4U);
  check_imported(drain(d, "t", "c"), "m", 0, 5);
  check_imported(drain(d, "t", "d"), "m", 0, 5);
}

TEST(the_queues_of_two_channels_go_each_to_its_own_also_over_a_kill) {
  const std::string data = folder("data");
  const Strings queues = {"t:a", "t:b", "t:c"};
  for (const auto& queue : queues) {
    const std::string records = disk_records(queue.substr(2), 0, 30);
    write_file(data + "/" + queue + ".diskqueue.000000.dat", records);
    write_metadata(data, queue, 30, 0, 0, records.size());
  }
  Process d;
  d.restart();
  for (const auto& queue : queues) check_imported(drain(d, "t", queue.substr(2)), queue.substr(2), 0, 30);
  d.restart();
  for (const auto& queue : queues) CHECK_EQ(drain(d, "t", queue.substr(2)).size(), 0U);
}

TEST(an_import_beside_a_ledger_that_was_never_written_loses_nothing) {
  const std::string data = folder("data");
  write_nsqd_dat(data);
  {
    Process d;
    Client(d).pub("t", "first");
    d.kill9();
  }
  write_file(data + "/t:c.ledger", "");  // killed before it had any bytes
  const std::string records = disk_records("m", 0, 1000);
  write_file(data + "/t:c.diskqueue.000000.dat", records);
  write_metadata(data, "t:c", 1000, 0, 0, records.size());
  Process d;
  CHECK_EQ(drain(d, "t", "c").size(), 1001U);
}

TEST(an_import_that_is_killed_loses_nothing_and_starts_again) {
  const std::string data = folder("data");
  write_nsqd_dat(data);
  const std::string records = disk_records("m", 0, 40000);
  write_file(data + "/t:c.diskqueue.000000.dat", records);
  write_metadata(data, "t:c", 40000, 0, 0, records.size());
  for (int round = 0; round < 5; round++) {
    const pid_t pid = spawn(flags_for(data), g_folder + "/out", g_folder + "/err");
    const auto end = Clock::now() + std::chrono::milliseconds(5 + 8 * round);
    while (Clock::now() < end && files(data, "diskqueue").size() == 2) continue;
    kill(pid, SIGKILL);
    wait_for(pid);
  }
  Process d;
  const auto messages = drain(d, "t", "c");
  CHECK_EQ(set_of(bodies_of(messages)).size(), 40000U);
  CHECK(messages.size() <= 40000 + 5 * 10000);  // each kill doubles at most the 10,000 between two syncs
}

// =====================================================================================================================
// Without files, and ephemerals
// =====================================================================================================================

TEST(mem_only_leaves_no_file_and_needs_no_lock) {
  const std::string data = folder("data");
  Process first({"--mem-only"}, data), second({"--mem-only"}, data);
  for (Process* d : {&first, &second}) {
    create_channel(*d, "t", "c");
    Client(*d).mpub("t", Strings(1000, std::string(1000, 'x')));
    CHECK_EQ(channel_count(*d, "t", "c", "depth"), 1000);
    CHECK_EQ(files(data), Strings{});
    CHECK_EQ(d->stop(), 0);
  }
}

TEST(mem_queue_size_bounds_what_is_in_memory_only) {
  for (const std::string suffix : {"", "#ephemeral"}) {
    Process d({"--mem-queue-size=100", suffix.empty() ? "--mem-only" : "--log-level=info"});
    create_channel(d, "t" + suffix, "c" + suffix);
    Client client(d);
    for (int i = 0; i < 50; i++) client.mpub("t" + suffix, numbered("m", 0, 10));
    const int64_t depth = channel_count(d, "t" + suffix, "c" + suffix, "depth");
    CHECK(depth >= 100 && depth <= 201);  // nsqd has such a queue for the topic and one for the channel
    CHECK_EQ(topic_count(d, "t" + suffix, "message_count"), 500);
  }
}

TEST(an_ephemeral_channel_goes_with_its_last_consumer) {
  Process d;
  Client first(d), second(d), publisher(d);
  first.sub("t", "c#ephemeral", 1);
  second.sub("t", "c#ephemeral", 1);
  publisher.pub("t", "a");
  first.close();
  EVENTUALLY(channel_count(d, "t", "c#ephemeral", "client_count") == 1);
  second.close();
  EVENTUALLY(channel_count(d, "t", "c#ephemeral", "depth") == -1);
  CHECK(topic_count(d, "t", "depth") >= 0);
}

TEST(an_ephemeral_topic_goes_with_its_last_channel_and_neither_has_files) {
  Process d;
  Client consumer(d), publisher(d);
  publisher.mpub("t#ephemeral", numbered("m", 0, 100));
  consumer.sub("t#ephemeral", "c#ephemeral", 100);
  for (int i = 0; i < 100; i++) consumer.fin(consumer.message());
  CHECK_EQ(files(d.data_path, "ephemeral"), Strings{});
  consumer.close();
  EVENTUALLY(get(d, "/stats?format=json").find("\"topic_name\":\"t#ephemeral") == std::string::npos);
  publisher.pub("t#ephemeral", "x");
  d.restart();
  CHECK_EQ(get(d, "/stats?format=json").find("t#ephemeral"), std::string::npos);
}

TEST(an_ephemeral_channel_beside_an_ordinary_one_costs_it_nothing) {
  Process d({"--mem-queue-size=10"});
  create_channel(d, "t", "c");
  Client slow(d);
  slow.sub("t", "tail#ephemeral", 0);
  Client(d).mpub("t", numbered("m", 0, 500));
  EVENTUALLY(channel_count(d, "t", "c", "depth") == 500);
  CHECK(channel_count(d, "t", "tail#ephemeral", "depth") <= 10);
  d.restart();
  CHECK_EQ(drain(d, "t", "c").size(), 500U);
}

// =====================================================================================================================
// Back-pressure and hostile clients
// =====================================================================================================================

TEST(a_busy_pair_does_not_wait_for_many_idle_clients) {
  Process d;
  Client consumer(d), publisher(d);
  consumer.sub("t", "c", 1);
  const auto round_trips = [&] {
    const auto start = Clock::now();
    for (int i = 0; i < 500; i++) {
      publisher.pub("t", "x");
      consumer.fin(consumer.message());
    }
    return ms_since(start);
  };
  const auto alone = round_trips();
  std::vector<Client> idle;
  for (int i = 0; i < 200; i++) idle.emplace_back(d);
  EVENTUALLY(round_trips() < 4 * alone);  // it would be ten times that if one of the two were looked at rarely
  for (auto& one : idle) one.pub("u", "x");
}

TEST(slow_and_silent_clients_delay_nobody) {
  Process d;
  std::vector<Client> slow;
  for (int i = 0; i < 200; i++) slow.emplace_back(d);
  std::vector<Http> web;
  for (int i = 0; i < 50; i++) web.emplace_back(d);
  const std::string trickle = "PUB t\n" + be32(20) + "abcdefghij";
  Client client(d);
  for (const char c : trickle) {
    for (auto& one : slow) one.send(std::string(1, c));
    for (auto& one : web) one.send("P");
    const auto start = Clock::now();
    client.pub("u", "x");
    CHECK(ms_since(start) < patience().count() / 10);
  }
  CHECK_EQ(topic_count(d, "u", "message_count"), static_cast<int64_t>(trickle.size()));
  for (auto& one : slow) one.send("klmnopqrst");
  for (auto& one : slow) one.expect("OK");
}

TEST(a_client_that_announces_much_and_sends_little_costs_little) {
  Process d;
  needs_memory_figures(d);
  Client(d).pub("t", "x");
  const int64_t before = memory_kb(d);
  std::vector<Client> many;
  for (int i = 0; i < 300; i++) {
    many.emplace_back(d);
    many.back().send((i % 2 == 0 ? "MPUB t\n" + be32(5242880) + be32(1000000) : "PUB t\n" + be32(1048576)) + "x");
  }
  for (auto& one : many) one.send("x");
  Client(d).pub("t", "x");
  CHECK(memory_kb(d) - before < 300 * 20 + 1024);
}

TEST(a_client_that_closes_its_half_gets_all_its_answers) {
  Process d;
  Client client(d);
  std::string all;
  for (int i = 0; i < 500; i++) all += "PUB t\n" + be32(1) + "x";
  client.send(all);
  client.half_close();
  for (int i = 0; i < 500; i++) client.expect("OK");
  CHECK(client.closed());
  CHECK_EQ(topic_count(d, "t", "message_count"), 500);
}

TEST(a_reset_in_the_middle_of_a_frame_hurts_only_its_client) {
  Process d;
  Client other(d);
  for (int i = 0; i < 50; i++) {
    Client client(d), consumer(d);
    client.send("PUB t\n" + be32(1000) + std::string(static_cast<size_t>(i) * 20, 'x'));
    consumer.sub("u", "c", 2500);
    other.mpub("u", Strings(20, std::string(50000, 'y')));
    consumer.message();
    consumer.reset();  // with much to read before it
    client.reset();
  }
  other.pub("t", "x");
  CHECK_EQ(topic_count(d, "t", "message_count"), 1);
  EVENTUALLY(channel_count(d, "u", "c", "client_count") == 0);
  CHECK_EQ(topic_count(d, "u", "message_count"), 1000);
}

TEST(a_consumer_that_stops_reading_with_2500_in_flight_holds_up_nobody) {
  Process d({"--msg-timeout=1500ms"});
  Client stuck(d), publisher(d);
  create_channel(d, "t", "good");
  stuck.sub("t", "c", 2500);
  publisher.mpub("t", Strings(100, std::string(10000, 'x')));
  EVENTUALLY(channel_count(d, "t", "c", "in_flight_count") > 0);
  for (int i = 1; i < 30; i++) publisher.mpub("t", Strings(100, std::string(10000, 'x')));
  CHECK(channel_count(d, "t", "c", "in_flight_count") <= 2500);
  CHECK(memory_kb(d) < 100000);
  CHECK_EQ(drain(d, "t", "good").size(), 3000U);
  stuck.close();
  const auto messages = drain(d, "t", "c");
  CHECK_EQ(messages.size(), 3000U);
}

TEST(a_publisher_that_does_not_read_its_answers_is_not_read_from) {
  Process d;
  Client client(d);
  std::string commands;
  for (int i = 0; i < 20000; i++) commands += "PUB t\n" + be32(1) + "x";
  size_t sent = 0, once;
  do sent += once = client.try_send(commands.substr(sent % 11), 500ms);
  while (once == commands.size() - (sent - once) % 11 && sent < 400000000);
  CHECK(sent < 400000000);
  CHECK(memory_kb(d) < 100000);
  client.half_close();
  for (size_t i = 0; i < sent / 11; i++) client.expect("OK");
  CHECK_EQ(topic_count(d, "t", "message_count"), static_cast<int64_t>(sent / 11));
}

TEST(when_descriptors_run_out_the_present_clients_go_on_and_new_ones_wait) {
  Process d({}, folder("data"), {{RLIMIT_NOFILE, 48}});
  Client present(d);
  present.pub("t", "x");
  std::vector<Socket> crowd;
  for (int i = 0; i < 100; i++) crowd.emplace_back(connect_to(d.tcp));
  const int64_t before = proc_status(d.pid(), "voluntary_ctxt_switches");
  for (int i = 0; i < 50; i++) present.pub("t", "x");
  present.nothing(1000ms);  // to see whether it spins meanwhile
  CHECK(proc_status(d.pid(), "voluntary_ctxt_switches") - before < 300);
  Client late(d);
  late.command("PUB t", "late");
  for (auto& one : crowd) one.close();
  late.expect("OK");
  EVENTUALLY(get(d, "/ping") == "OK");
  CHECK_EQ(drain(d, "t", "c").size(), 52U);
}

TEST(when_memory_runs_out_a_connection_dies_and_not_the_daemon) {
  const Strings flags{"--max-msg-size=50000000", "--max-body-size=60000000"};
  {
    Process probe(flags);
    needs_memory_figures(probe);
  }
  Process d(flags, folder("data"), {{RLIMIT_AS, 400000000}});
  Client present(d);
  present.pub("t", "x");
  std::vector<Client> greedy;
  for (int i = 0; i < 16; i++) {
    greedy.emplace_back(d);
    greedy.back().try_send("PUB t\n" + be32(50000000) + std::string(40000000, 'x'), patience());
  }
  present.pub("t", "y");
  greedy.clear();
  EVENTUALLY(d.log().find("out of memory") != std::string::npos);
  CHECK_EQ(drain(d, "t", "c").size(), 2U);
}

TEST(junk_on_either_port_kills_nothing) {
  Process d;
  unsigned seed = 12345;
  const auto random = [&] { return seed = seed * 1664525 + 1013904223, seed >> 16; };
  const Strings words{"  V2",
                      "SUB t c\n",
                      "PUB t\n",
                      "RDY 1\n",
                      "MPUB t\n",
                      "IDENTIFY\n",
                      "FIN 0123456789abcdef\n",
                      "GET / HTTP/1.1\r\n",
                      "POST /pub?topic=%",
                      "Host: x\r\n",
                      "\r\n",
                      "{\"a\":[[[[",
                      be32(5),
                      be32(0xffffffff),
                      "CLS\n",
                      "AUTH\n"};
  for (int i = 0; i < 300; i++) {
    Socket junk(connect_to(i % 2 == 0 ? d.tcp : d.http));
    std::string bytes = i % 2 == 0 && i % 3 != 0 ? "  V2" : "";
    for (size_t n = random() % 12; n > 0; n--)
      bytes +=
          random() % 3 == 0 ? std::string(random() % 50, static_cast<char>(random())) : words[random() % words.size()];
    junk.try_send(bytes, patience());
    if (random() % 2 == 0) junk.reset();
  }
  Client(d).pub("t", "x");
  CHECK_EQ(get(d, "/ping"), "OK");
  CHECK_EQ(d.stop(), 0);
}

// ---- Everything at once

// What the consumers of a channel know. It is exact: those that finish and requeue stay for all their answers.
struct LoadChannel {
  std::mutex mutex;
  std::vector<uint16_t> attempts;  // the most that each message came with, by its number; 0: it has not come
  std::atomic<int> came{0}, finished{0}, requeued{0};
};
struct LoadTopic {
  std::string name;
  std::atomic<int> published{0};  // messages, numbered from 0; all are acknowledged once their publishers have gone
  std::atomic<int64_t> bytes{0};
  LoadChannel channels[3];
};
struct Load {
  LoadTopic topics[4];
  std::atomic<int> connections{0};
  std::atomic<bool> publishing{true}, consuming{true};
  std::vector<std::future<void>> publishers, consumers;
  ~Load() { publishing = consuming = false; }  // where the test fails; the futures wait for their threads
};

std::string load_body(int number) {
  return std::to_string(number) + std::string(static_cast<size_t>(number % 300), 'x');
}

// Publishers are faster than consumers: they wait for the slowest channel, or what is left at the end has no bound.
void wait_for_consumers(const Load& load, const LoadTopic& topic) {
  const auto behind = [&](const LoadChannel& channel) { return topic.published - channel.came > 2000; };
  while (load.publishing && std::any_of(std::begin(topic.channels), std::end(topic.channels), behind))
    std::this_thread::sleep_for(1ms);
}

void load_publisher(const Ports& daemon, int which, Load& load) {
  LoadTopic& topic = load.topics[which % 4];
  for (int session = 0; load.publishing; session++) {
    Client client(daemon);  // comes and goes
    load.connections++;
    for (int batch = 0; batch < 5; batch++) {
      wait_for_consumers(load, topic);
      Strings bodies;
      for (int number = topic.published.fetch_add(11); bodies.size() < 11; number++)
        topic.bytes += static_cast<int64_t>(bodies.emplace_back(load_body(number)).size());
      client.dpub(topic.name, 30, bodies.back());
      bodies.pop_back();
      client.mpub(topic.name, bodies);
    }
    if (session % 2 == 0) client.send("MPUB " + topic.name + "\n" + be32(1000) + be32(10)), client.reset();
  }
}

// Notes a message, or that one was answered too late, so that it comes again.
std::optional<Message> load_note(LoadChannel& channel, const Frame& frame) {
  if (frame.type == 1 && frame.data.rfind("E_FIN_FAILED", 0) == 0) return channel.finished--, std::nullopt;
  if (frame.type == 1 && frame.data.rfind("E_REQ_FAILED", 0) == 0) return channel.requeued--, std::nullopt;
  CHECK_EQ(frame.type, 2);
  const Message message = Client::parse(frame.data);
  const int number = std::atoi(message.body.c_str());
  CHECK_EQ(message.body, load_body(number));
  const std::lock_guard<std::mutex> lock(channel.mutex);
  if (channel.attempts.size() <= static_cast<size_t>(number)) channel.attempts.resize(static_cast<size_t>(number) + 1);
  uint16_t& attempts = channel.attempts[static_cast<size_t>(number)];
  if (attempts == 0) channel.came++;
  attempts = std::max(attempts, static_cast<uint16_t>(message.attempts));
  return message;
}

// Goes from channel to channel. Finishes most messages, requeues some, lets some time out, and leaves with some in
// flight. Now and then it is rude: it answers nothing and resets the connection.
void load_consumer(const Ports& daemon, int which, Load& load) {
  unsigned n = static_cast<unsigned>(which);
  for (int session = which; load.consuming; session++) {
    LoadTopic& topic = load.topics[session % 4];
    LoadChannel& channel = topic.channels[session % 3];
    const bool rude = session % 5 == 0;
    Client client(daemon);
    load.connections++;
    client.sub(topic.name, "c" + std::to_string(session % 3), 20);
    for (int i = 0; i < (rude ? 10 : 300); i++) {
      const auto frame = client.frame(20ms);
      if (!frame) break;
      const auto message = load_note(channel, *frame);
      n = n * 1664525 + 1013904223;
      const unsigned dice = n >> 16 & 63;
      if (rude || !message || dice < 2) continue;
      if (dice > 5) channel.finished++, client.fin(*message);
      else channel.requeued++, client.req(*message, dice % 2 == 0 ? 0 : 20);
    }
    if (rude) client.reset();
    else client.command("CLS");
    for (bool answered = rude; !answered;) {
      const auto frame = client.frame();
      CHECK(frame);
      answered = frame->type == 0;  // by CLOSE_WAIT, and nothing comes after it
      if (!answered) load_note(channel, *frame);
    }
  }
}

// The sum of some numbers over all topics and channels, from one look at /stats.
int64_t sum_in_stats(const Ports& daemon, const Strings& keys) {
  const std::string json = get(daemon, "/stats?format=json&include_clients=false&include_mem=false");
  int64_t sum = 0;
  for (const auto& key : keys)
    for (size_t at = 0; (at = json.find("\"" + key + "\":", at)) != std::string::npos; at++)
      sum += number_at(json, key, at);
  return sum;
}

// With all consumed, /stats says what the clients know: each channel was given each message, and delivered it once, and
// once more for each time that it was requeued or timed out.
void check_load(const Ports& daemon, const LoadTopic& topic, std::map<std::string, int64_t>& totals) {
  CHECK_EQ(topic_count(daemon, topic.name, "message_count"), topic.published.load());
  CHECK_EQ(topic_count(daemon, topic.name, "message_bytes"), topic.bytes.load());
  totals["published"] += topic.published;
  for (const LoadChannel& channel : topic.channels) {
    const std::string name = "c" + std::to_string(&channel - topic.channels), json = stats_of(daemon, topic.name);
    const auto count = [&](const char* key) { return number_at(json, key, json.find("\"" + name + "\"")); };
    const int64_t delivered = std::accumulate(channel.attempts.begin(), channel.attempts.end(), int64_t{0});
    CHECK_EQ(channel.came.load(), topic.published.load());
    CHECK_EQ(channel.finished.load(), topic.published.load());
    CHECK_EQ(count("message_count"), topic.published.load());
    CHECK_EQ(count("requeue_count"), channel.requeued.load());
    CHECK_EQ(count("timeout_count"), delivered - channel.finished - channel.requeued);
    for (const char* key : {"requeue_count", "timeout_count"}) totals[key] += count(key);
    totals["delivered"] += delivered;
  }
}

TEST(under_load_from_clients_that_come_and_go_every_channel_gets_every_message) {
  Process d({"--msg-timeout=200ms"});
  Load load;
  for (int i = 0; i < 12; i++) {
    load.topics[i % 4].name = "t" + std::to_string(i % 4);
    create_channel(d, load.topics[i % 4].name, "c" + std::to_string(i % 3));
  }
  std::map<std::string, int64_t> totals{{"kB before", memory_kb(d)}};
  for (int i = 0; i < 8; i++) {
    load.publishers.push_back(std::async(std::launch::async, load_publisher, Ports(d), i, std::ref(load)));
    load.consumers.push_back(std::async(std::launch::async, load_consumer, Ports(d), i, std::ref(load)));
  }
  std::this_thread::sleep_for(std::chrono::duration<double>(number_from_environment("LOAD_SECONDS", 2)));
  totals["kB under load"] = memory_kb(d);
  load.publishing = false;
  for (auto& one : load.publishers) one.get();
  const auto failed = [](const auto& consumer) { return consumer.wait_for(0s) == std::future_status::ready; };
  EVENTUALLY(sum_in_stats(d, {"depth", "in_flight_count", "deferred_count"}) == 0 ||
             std::any_of(load.consumers.begin(), load.consumers.end(), failed));
  load.consuming = false;
  for (auto& one : load.consumers) one.get();
  EVENTUALLY(sum_in_stats(d, {"client_count"}) == 0);
  for (const LoadTopic& topic : load.topics) check_load(d, topic, totals);
  EVENTUALLY((totals["kB after"] = memory_kb(d)) - totals["kB before"] < 4000);
  totals["connections"] = load.connections;
  for (const auto& [what, number] : totals) std::printf("%s %lld\n", what.c_str(), static_cast<long long>(number));
  CHECK(totals["requeue_count"] > 0 && totals["timeout_count"] > 0);
  CHECK_EQ(d.stop(), 0);  // a sanitizer looks for leaks then
}

TEST(clients_that_come_and_go_leave_nothing_behind) {
  Process d;
  needs_memory_figures(d);
  Client publisher(d);
  const auto come_and_go = [&](int times) {
    for (int i = 0; i < times; i++) {
      Client client(d);
      client.sub("t", "c" + std::to_string(i % 10), 10);
      publisher.pub("t", "x");
      client.message();
    }
    EVENTUALLY(get(d, "/stats?format=json").find("\"client_count\":1") == std::string::npos);
  };
  const auto descriptors = [&] { return files("/proc/" + std::to_string(d.pid()) + "/fd").size(); };
  come_and_go(100);
  const size_t open_files = descriptors();
  const int64_t memory = memory_kb(d);
  come_and_go(1000);
  EVENTUALLY(descriptors() <= open_files);
  CHECK(memory_kb(d) - memory < 4000);
}

// =====================================================================================================================
// Embedding. That the header can be included in more than one translation unit is shown by the Makefile, which links
// this file with a second one that has no other line than the include.
// =====================================================================================================================

TEST(a_program_of_ten_lines_publishes_and_consumes) {
  nsqd::Options options;
  options.tcp_address = options.http_address = "127.0.0.1:0";
  options.mem_only = true;
  options.log = [](std::string_view) {};
  nsqd::Daemon daemon(options);
  daemon.start();
  daemon.publish("clicks", "hello");
  nsqd::Subscription subscription = daemon.subscribe("clicks", "archive");
  const auto message = subscription.next(patience());
  CHECK(message && message->body == "hello" && message->attempts == 1 && message->id.size() == 16);
  CHECK(message->timestamp > now_ns() - 60'000'000'000 && message->timestamp <= now_ns());
  CHECK(subscription.finish(*message));
  CHECK(!subscription.finish(*message));
  CHECK(!subscription.next(10ms));
  CHECK(daemon.tcp_port() > 0 && daemon.http_port() > 0);
  daemon.stop();
}

TEST(several_threads_publish_and_consume_in_process) {
  Local d(folder("data"));
  d->create_channel("t", "c");
  std::vector<std::future<void>> publishers;
  for (int p = 0; p < 4; p++) {
    publishers.push_back(std::async(std::launch::async, [&d, p] {
      for (const auto& body : numbered(std::to_string(p) + ".", 0, 500)) d->publish("t", body);
      d->publish("t", numbered(std::to_string(p) + ".", 500, 1000));
    }));
  }
  std::atomic<int> left{4000};
  std::vector<std::future<Strings>> consumers;
  for (int c = 0; c < 3; c++) {
    consumers.push_back(std::async(std::launch::async, [&d, &left] {
      nsqd::Subscription subscription = d->subscribe("t", "c", 20);
      Strings got;
      const auto end = Clock::now() + patience();
      while (left > 0 && Clock::now() < end) {
        if (const auto message = subscription.next(5ms); message && subscription.finish(*message))
          left--, got.push_back(message->body);
      }
      return got;
    }));
  }
  std::set<std::string> all;
  for (auto& publisher : publishers) publisher.get();
  for (auto& consumer : consumers)
    for (auto& body : consumer.get()) CHECK(all.insert(body).second);
  CHECK_EQ(all.size(), 4000U);
  CHECK_EQ(d->stats().topics.at(0).message_count, 4000U);
}

TEST(two_daemons_live_in_one_process) {
  Local first(folder("one")), second(folder("two")), third;
  first->publish("t", "1");
  second->publish("t", "2");
  third->publish("t", "3");
  CHECK_EQ(drain(first, "t", "c").at(0).body, "1");
  CHECK_EQ(drain(second, "t", "c").at(0).body, "2");
  first->stop();
  CHECK_EQ(drain(third, "t", "c").at(0).body, "3");
  CHECK(first.tcp != second.tcp && second.tcp != third.tcp);
}

TEST(what_a_publisher_does_wrong_is_an_exception_that_harms_nothing) {
  Local d;
  CHECK_THROWS(std::invalid_argument, d->publish("not valid", "x"));
  CHECK_THROWS(std::invalid_argument, d->publish("t", ""));
  CHECK_THROWS(std::invalid_argument, d->publish("t", std::string(1048577, 'x')));
  CHECK_THROWS(std::invalid_argument, d->publish("t", Strings{"ok", ""}));
  CHECK_THROWS(std::invalid_argument, d->publish_deferred("t", "x", -1s));
  CHECK_THROWS(std::invalid_argument, d->publish_deferred("t", "x", 2h));
  CHECK_THROWS(std::invalid_argument, d->create_topic("a/b"));
  CHECK_THROWS(std::invalid_argument, d->create_channel("t", ""));
  CHECK_THROWS(std::invalid_argument, d->subscribe("t", "a b"));
  CHECK(!d->empty_topic("u") && !d->delete_topic("u") && !d->empty_channel("u", "c") && !d->pause_topic("u"));
  d->publish("t", "good");
  CHECK_EQ(d->stats().topics.at(0).message_count, 1U);
  d->stop();
  CHECK_THROWS(std::runtime_error, d->publish("t", "too late"));
  d->stop();
}

TEST(a_subscription_requeues_touches_times_out_and_gives_back) {
  nsqd::Options options = local_options();
  options.msg_timeout = 1500ms;
  Local d(options);
  {
    nsqd::Subscription subscription = d->subscribe("t", "c", 2);
    d->publish("t", "a");
    auto message = subscription.next(patience());
    CHECK(message && subscription.requeue(*message, 300ms));
    CHECK_EQ(d->stats().topics.at(0).channels.at(0).deferred_count, 1);
    message = subscription.next(patience());
    CHECK(message && message->attempts == 2 && subscription.touch(*message));
    const auto again = subscription.next(patience());  // after its time-out
    CHECK(again && again->attempts == 3);
    d->publish("t", "b");
    CHECK(subscription.next(patience()));
    CHECK_EQ(d->stats().topics.at(0).channels.at(0).in_flight_count, 2);
  }
  const auto start = Clock::now();
  nsqd::Subscription other = d->subscribe("t", "c", 2);
  CHECK(other.next(patience()) && other.next(patience()));
  CHECK(ms_since(start) < 1000);
  d->publish_deferred("t", "c", 200ms);
  nsqd::Subscription moved = std::move(other), assigned = d->subscribe("t", "another");
  CHECK(!moved.next(10ms));
  assigned = std::move(moved);
  CHECK_EQ(d->stats().topics.at(0).channels.at(1).in_flight_count, 2);
}

TEST(a_subscription_ends_when_the_daemon_stops_or_its_channel_is_deleted) {
  for (const bool stop : {true, false}) {
    Local d;
    nsqd::Subscription subscription = d->subscribe("t", "c");
    const auto start = Clock::now();
    auto waiting = std::async(std::launch::async, [&] { return subscription.next(10 * patience()).has_value(); });
    if (stop) d->stop();
    else CHECK(d->delete_channel("t", "c"));
    CHECK(!waiting.get());
    CHECK(ms_since(start) < patience().count());
    CHECK(!subscription.next(1ms));
  }
}

TEST(process_and_network_are_the_same_queue) {
  Local d(folder("data"));
  Client client(d);
  client.sub("t", "c", 1);
  d->publish("t", "from inside");
  const Message message = client.message();
  CHECK_EQ(message.body, "from inside");
  nsqd::Subscription subscription = d->subscribe("t", "c");
  client.command("RDY 0");
  client.req(message, 0);
  const auto again = subscription.next(patience());
  CHECK(again && again->id == message.id && again->attempts == 2);
  CHECK(d->pause_channel("t", "c"));
  CHECK_EQ(number_at(get(d, "/stats?format=json"), "client_count", 0), 2);
  const nsqd::Stats stats = d->stats();
  CHECK_EQ(stats.health, "OK");
  CHECK_EQ(stats.topics.at(0).name, "t");
  CHECK(stats.topics[0].channels.at(0).paused);
  CHECK_EQ(stats.topics[0].channels[0].in_flight_count, 1);
  CHECK_EQ(stats.topics[0].channels[0].clients.size(), 2U);
  CHECK(d->delete_topic("t"));
  CHECK(client.closed());
}

TEST(a_consumer_in_the_process_is_shown_like_any_client) {
  Local d(folder("data"));
  nsqd::Subscription subscription = d->subscribe("t", "c", 3);
  d->publish("t", {"finished", "requeued", "in flight"});
  const auto first = subscription.next(patience()), second = subscription.next(patience());
  CHECK(first && subscription.finish(*first));
  CHECK(second && subscription.requeue(*second, 1min));
  const nsqd::ChannelStats channel = d->stats().topics.at(0).channels.at(0);
  const nsqd::ClientStats client = channel.clients.at(0);
  CHECK_EQ(client.hostname, nsqd::detail::host_name());
  CHECK_EQ(client.client_id, client.hostname);
  CHECK_HAS(client.user_agent, "nsqd.hpp/");
  CHECK_EQ(client.remote_address, "@");
  CHECK_EQ(client.state, 3);
  CHECK_EQ(client.ready_count, 3);
  CHECK_EQ(client.message_count, 3);
  CHECK_EQ(client.finish_count, 1);
  CHECK_EQ(client.requeue_count, 1);
  CHECK_EQ(client.in_flight_count, 1);
  CHECK(std::abs(client.connected_at - time(nullptr)) < 60);
  CHECK(client.connected_for > 0);
  CHECK_EQ(channel.global_count, 3U);
}

TEST(a_daemon_that_was_embedded_leaves_no_trace_in_the_process) {
  if (!exists("/proc/self/fd")) throw Skipped("no /proc/self/fd here");
  struct sigaction before {
  }, after{};
  const auto threads = [] { return files("/proc/self/task").size(); };
  { const Local warm_up; }
  const size_t descriptors = files("/proc/self/fd").size(), count = threads();
  for (int i = 0; i < 5; i++) {
    sigaction(SIGPIPE, nullptr, &before);
    Local d(folder("data"));
    Client client(d);
    client.sub("t", "c", 1);
    d->publish("t", "x");
    client.message();
    sigaction(SIGPIPE, nullptr, &after);
    CHECK(before.sa_handler == after.sa_handler);
    sigaction(SIGTERM, nullptr, &after);
    CHECK(after.sa_handler == SIG_DFL);
  }
  CHECK_EQ(files("/proc/self/fd").size(), descriptors);
  EVENTUALLY(threads() == count);
}

TEST(the_log_can_be_taken_line_by_line) {
  Log log;
  {
    nsqd::Options options = local_options();
    options.log_level = nsqd::Level::kInfo;
    options.log_prefix = "[mine] ";
    options.log = [&log](std::string_view line) {
      const std::lock_guard<std::mutex> lock(log.mutex);
      log.text += std::string(line) + "|";
    };
    Local d(options);
    d->create_topic("t");
  }
  const std::string all = log.all();
  CHECK_EQ(all.find('\n'), std::string::npos);
  CHECK_HAS(all, "|[mine] ");
  CHECK_HAS(all, " INFO: TOPIC(t): created|");
  CHECK_HAS(all, " INFO: NSQ: bye|");
}

TEST(a_daemon_that_cannot_start_throws_and_says_why) {
  Local d;
  nsqd::Options options = local_options();
  options.tcp_address = "127.0.0.1:" + std::to_string(d.tcp);
  try {
    nsqd::Daemon second(options);
    fail(__LINE__, "two daemons listen on one port");
  } catch (const Failed&) {
    throw;
  } catch (const std::runtime_error& error) {
    CHECK_HAS(error.what(), options.tcp_address);
  }
  CHECK_THROWS(std::runtime_error, nsqd::Daemon(local_options("/no/such/folder")));
}

TEST(counting_is_64_bit_and_attempts_go_beyond_255) {
  Local d(folder("data"));
  nsqd::Subscription subscription = d->subscribe("t", "c");
  d->publish("t", "x");
  for (int attempt = 1; attempt <= 300; attempt++) {
    const auto message = subscription.next(patience());
    CHECK(message.has_value());
    CHECK_EQ(message->attempts, attempt);
    CHECK(subscription.requeue(*message));
  }
  CHECK_EQ(d->stats().topics.at(0).channels.at(0).requeue_count, 300U);
}

// =====================================================================================================================
// Cluster: nsqlookupd, an auth server and statsd, played by the test
// =====================================================================================================================

// The other end of a peer connection of the daemon, as nsqlookupd has it.
struct LookupConversation {
  Socket socket;
  void answer(const std::string& text) const { socket.send(be32(text.size()) + text); }
  // The IDENTIFY that begins each connection; its JSON.
  std::string identify(int http_port = 1, int line = __builtin_LINE()) {
    check_eq(socket.take(4, line), std::string("  V1"), "the magic", line);
    check_eq(socket.take_line(line), std::string("IDENTIFY\n"), "the first command", line);
    const std::string json = socket.take(from_be(socket.take(4, line)), line);
    answer("{\"broadcast_address\":\"127.0.0.1\",\"hostname\":\"h\",\"http_port\":" + std::to_string(http_port) +
           ",\"tcp_port\":1,\"version\":\"1.3.0\"}");
    return json;
  }
  // Answers commands until all of these have come, in whatever order.
  void told(std::set<std::string> wanted, int line = __builtin_LINE()) {
    while (!wanted.empty()) {
      wanted.erase(socket.take_line(line));
      answer("OK");
    }
  }
};

TEST(an_nsqlookupd_is_told_of_all_topics_and_channels_and_again_after_it_was_away) {
  const Listener lookupd;
  Process d({"--lookupd-tcp-address=" + lookupd.address(), "--http-client-request-timeout=200ms"});
  LookupConversation peer{lookupd.accept()};
  const std::string json = peer.identify();
  CHECK_EQ(number_at(json, "tcp_port", 0), d.tcp);
  CHECK_EQ(number_at(json, "http_port", 0), d.http);
  CHECK_HAS(json, "\"broadcast_address\":\"127.0.0.1\"");
  post(d, "/topic/create?topic=t");
  peer.told({"REGISTER t\n"});
  post(d, "/channel/create?topic=t&channel=c");
  peer.told({"REGISTER t c\n"});
  post(d, "/topic/create?topic=u");
  peer.told({"REGISTER u\n"});
  peer.socket.close();
  post(d, "/topic/create?topic=v");
  LookupConversation again{lookupd.accept()};
  again.identify();
  again.told({"REGISTER t c\n", "REGISTER u\n", "REGISTER v\n"});
  post(d, "/channel/delete?topic=t&channel=c");
  again.told({"UNREGISTER t c\n"});
}

TEST(of_the_addresses_of_a_name_all_are_tried) {
  const Listener lookupd;  // at 127.0.0.1, while an empty host is ::1, too, which comes first
  const std::string port = lookupd.address().substr(lookupd.address().rfind(':'));
  Process d({"--lookupd-tcp-address=" + port});
  LookupConversation{lookupd.accept()}.identify();
}

TEST(an_nsqlookupd_that_is_silent_or_mad_delays_nobody) {
  const Listener silent, mad;
  Process d({"--lookupd-tcp-address=" + silent.address(), "--lookupd-tcp-address=" + mad.address(),
             "--lookupd-tcp-address=127.0.0.1:1"});
  const Socket hush = silent.accept();
  const Socket mad_one = mad.accept();
  mad_one.try_send(std::string(100000, '\xff'), 100ms);
  Client client(d);
  client.pub("t", "makes the topic");
  const auto start = Clock::now();
  for (int i = 0; i < 200; i++) client.pub("t", "x");
  CHECK(ms_since(start) < patience().count() / 10);
  EVENTUALLY(topic_count(d, "t", "message_count") == 201);
  CHECK_EQ(d.stop(), 0);
}

TEST(a_new_topic_gets_the_channels_that_nsqlookupd_knows_before_its_first_message) {
  const Listener lookupd, web;
  Process d({"--lookupd-tcp-address=" + lookupd.address()});
  LookupConversation peer{lookupd.accept()};
  peer.identify(web.port);
  Client client(d);
  std::string topic;
  for (int i = 0; topic.empty() || !web.knocked(100ms);
       i++) {  // the first few may come before the answer to IDENTIFY does
    if (i > 0) client.expect("OK");
    topic = "t" + std::to_string(i);
    client.command("PUB " + topic, "first");
  }
  Socket query = web.accept();
  CHECK_EQ(query.take_line(), "GET /channels?topic=" + topic + " HTTP/1.1\r\n");
  while (query.take_line() != "\r\n") continue;
  const std::string json = "{\"channels\":[\"archive\",\"metrics\",\"tail#ephemeral\"]}";
  query.send("HTTP/1.1 200 OK\r\nContent-Length: " + std::to_string(json.size()) + "\r\n\r\n" + json);
  query.close();
  client.expect("OK");
  for (const char* channel : {"archive", "metrics"}) EVENTUALLY(channel_count(d, topic, channel, "depth") == 1);
  CHECK_EQ(channel_count(d, topic, "tail#ephemeral", "depth"), -1);
}

TEST(nsqlookupds_can_be_changed_while_it_runs) {
  const Listener first, second;
  Process d({"--lookupd-tcp-address=" + first.address()});
  LookupConversation peer{first.accept()};
  peer.identify();
  const std::string both = "[\"" + second.address() + "\"]";
  CHECK_EQ(http(d, "PUT", "/config/nsqlookupd_tcp_addresses", both).body, both);
  LookupConversation other{second.accept()};
  other.identify();
  peer.socket.take_rest();
  CHECK_EQ(get(d, "/config/nsqlookupd_tcp_addresses"), both);
}

// Answers one question to an auth server; returns its request line.
std::string grant(const Listener& server, const std::string& json, int line = __builtin_LINE()) {
  Socket question = server.accept(line);
  const std::string first = question.take_line(line);
  while (question.take_line(line) != "\r\n") continue;
  question.send("HTTP/1.1 200 OK\r\nContent-Length: " + std::to_string(json.size()) + "\r\nConnection: close\r\n\r\n" +
                json);
  return first;
}

std::string auth_json(int ttl, const std::string& topic, const std::string& permissions) {
  return "{\"ttl\":" + std::to_string(ttl) +
         ",\"identity\":\"me\",\"identity_url\":\"http://me\",\"authorizations\":[{\"topic\":\"" + topic +
         "\",\"channels\":[\".*\"],\"permissions\":[" + permissions + "]}]}";
}

TEST(with_an_auth_server_one_may_do_what_it_grants) {
  const Listener server;
  Process d({"--auth-http-address=" + server.address()});
  Client unknown(d), client(d);
  unknown.command("PUB t", "x");
  unknown.expect_error("E_AUTH_FIRST AUTH required before PUB");
  client.command("AUTH", "a&b%");
  CHECK_EQ(grant(server, auth_json(3600, "^t$", "\"publish\"")),
           "GET /auth?common_name=&remote_ip=127.0.0.1&secret=a%26b%25&tls=false HTTP/1.1\r\n");
  client.expect("{\"identity\":\"me\",\"identity_url\":\"http://me\",\"permission_count\":1}");
  client.pub("t", "x");
  client.command("SUB t c");
  client.expect_error("E_UNAUTHORIZED AUTH failed for SUB on \"t\" \"c\"");
}

TEST(a_slow_auth_server_holds_up_only_the_one_who_asks_and_keeps_his_order) {
  const Listener server;
  Process d({"--auth-http-address=" + server.address()});
  Client waiting(d), ready(d);
  ready.command("AUTH", "quick");
  grant(server, auth_json(3600, ".*", "\"publish\",\"subscribe\""));
  ready.frame();
  waiting.send("AUTH\n" + be32(4) + "slowPUB t\n" + be32(1) + "aPUB t\n" + be32(1) + "bNO\n");
  Socket question = server.accept();
  for (int i = 0; i < 100; i++) ready.pub("u", "x");
  CHECK(topic_count(d, "t", "message_count") <= 0);
  const std::string json = auth_json(3600, ".*", "\"publish\"");
  question.send("HTTP/1.1 200 OK\r\nContent-Length: " + std::to_string(json.size()) + "\r\n\r\n" + json);
  CHECK_HAS(waiting.frame()->data, "permission_count");
  waiting.expect("OK");
  waiting.expect("OK");
  waiting.expect_error("E_INVALID");
  Client refused(d);
  refused.command("AUTH", "nobody");
  grant(server, "{\"ttl\":1,\"authorizations\":[]}");
  refused.expect_error("E_UNAUTHORIZED AUTH no authorizations found");
}

TEST(an_auth_server_may_be_asked_by_post_answer_in_chunks_and_fail) {
  const Listener server;
  Process d({"--auth-http-address=http://" + server.address() + "/ask", "--auth-http-request-method=post"});
  Client client(d), unlucky(d);
  client.command("AUTH", "s\"");
  Socket question = server.accept();
  CHECK_EQ(question.take_line(), "POST /ask HTTP/1.1\r\n");
  while (question.take_line() != "\r\n") continue;
  const std::string asked =
      "{\"common_name\":[\"\"],\"remote_ip\":[\"127.0.0.1\"],\"secret\":[\"s\\\"\"],\"tls\":[\"false\"]}";
  CHECK_EQ(question.take(asked.size()), asked);
  const std::string json = auth_json(100, ".*", "\"publish\"");
  char size[24];
  std::snprintf(size, sizeof size, "%zx\r\n", json.size());
  question.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + (size + json) + "\r\n0\r\n\r\n");
  CHECK_HAS(client.frame()->data, "\"identity\":\"me\"");
  client.pub("t", "x");
  unlucky.command("AUTH", "s");
  server.accept().send("HTTP/1.1 500 Oh no\r\nContent-Length: 0\r\n\r\n");
  unlucky.expect_error("E_AUTH_FAILED AUTH failed");
}

TEST(a_grant_is_asked_for_again_when_its_time_is_over) {
  const Listener server;
  Process d({"--auth-http-address=" + server.address()});
  Client client(d);
  client.command("AUTH", "s");
  grant(server, auth_json(1, ".*", "\"publish\""));
  client.frame();
  while (!server.knocked(10ms)) {
    client.command("PUB t", "x");
    if (!server.knocked(0ms) && client.frame(50ms)) continue;
  }
  CHECK_HAS(grant(server, auth_json(100, "^other$", "\"publish\"")), "secret=s");
  auto last = client.frame();
  while (last && last->type == 0) last = client.frame();
  CHECK(last && last->data == "E_UNAUTHORIZED AUTH failed for PUB on \"t\" \"\"");
}

TEST(statsd_gets_counters_as_differences_and_gauges) {
  const Listener statsd(SOCK_DGRAM);
  Process d({"--statsd-address=" + statsd.address(), "--statsd-interval=1100ms", "--statsd-prefix=q.%s",
             "--broadcast-http-port=4151", "--statsd-mem-stats=false", "--statsd-exclude-ephemeral",
             "--e2e-processing-latency-percentile=0.99"});
  create_channel(d, "t", "c");
  Client client(d);
  client.mpub("t", Strings(10, "abc"));
  client.pub("e#ephemeral", "x");
  std::string all;
  const auto has = [&](const std::string& line) {
    return all.find("q.127_0_0_1_4151." + line + "\n") != std::string::npos;
  };
  while (!has("topic.t.message_count:10|c") || !has("topic.t.message_bytes:30|c") ||
         !has("topic.t.channel.c.depth:10|g") || !has("topic.t.channel.c.clients:0|g")) {
    const std::string packet = statsd.packet();
    CHECK(packet.size() <= 508);
    all += packet;
  }
  client.pub("t", "abcd");
  while (!has("topic.t.message_count:1|c") || !has("topic.t.message_bytes:4|c") || !has("topic.t.channel.c.depth:11|g"))
    all += statsd.packet();
  client.sub("t", "c", 1);
  client.fin(client.message());
  for (const std::string of : {"topic.t", "topic.t.channel.c"}) {  // a gauge in nanoseconds, 0 until something is finished
    const std::string latency = "q.127_0_0_1_4151." + of + ".e2e_processing_latency_99:";
    const auto last = [&] { return all.substr(std::min(all.rfind(latency), all.size() - latency.size()) + latency.size()); };
    while (last().empty() || std::stoll(last()) == 0) all += statsd.packet();
    CHECK_HAS(last().substr(0, last().find('\n')), "|g");
  }
  CHECK_EQ(all.find("ephemeral"), std::string::npos);
  CHECK_EQ(all.find("mem."), std::string::npos);
}

TEST(latency_percentiles_follow_what_consumers_take) {
  Process d({"--e2e-processing-latency-percentile=0.5,1.0", "--e2e-processing-latency-window-time=1h"});
  Client client(d);
  client.mpub("t", Strings(100, "x"));
  client.sub("t", "c", 100);
  std::vector<Message> held;
  for (int i = 0; i < 100; i++) held.push_back(client.message());
  for (int i = 0; i < 95; i++) client.fin(held[static_cast<size_t>(i)]);
  EVENTUALLY(channel_count(d, "t", "c", "in_flight_count") == 5);
  const int64_t quick = now_ns() - held[0].timestamp;
  client.nothing(400ms);  // the others take longer
  for (size_t i = 95; i < 100; i++) client.fin(held[i]);
  EVENTUALLY(channel_count(d, "t", "c", "in_flight_count") == 0);
  const std::string json = get(d, "/stats?format=json&topic=t");
  const size_t latency = json.find("\"e2e_processing_latency\"");
  CHECK_EQ(number_at(json, "count", latency), 100);
  const int64_t most = number_at(json, "value", json.find("\"quantile\":1", latency));
  const int64_t median = number_at(json, "value", json.find("\"quantile\":0.5", latency));
  CHECK(median > 0 && median < quick * 11 / 10);
  CHECK(most > 390'000'000);
}

TEST(with_topology_a_near_consumer_that_is_idle_comes_first) {
  Process d({"--topology-region=r", "--topology-zone=z", "--enable-experiment=topology-aware-consumption"});
  Client far(d), region(d), zone(d), publisher(d);
  far.identify("{\"topology_region\":\"q\",\"topology_zone\":\"y\"}");
  region.identify("{\"topology_region\":\"r\",\"topology_zone\":\"y\"}");
  zone.identify("{\"topology_region\":\"r\",\"topology_zone\":\"z\"}");
  for (Client* client : {&far, &region, &zone}) client->sub("t", "c", 1);
  EVENTUALLY(get(d, "/stats?format=json").find("\"ready_count\":0") == std::string::npos);
  for (int i = 0; i < 10; i++) {
    publisher.pub("t", "x");
    const Message message = zone.message();
    zone.fin(message);
    zone.pub("barrier", "x");  // finished by now, so idle again
  }
  CHECK_EQ(channel_count(d, "t", "c", "zone_local_msg_count"), 10);
  CHECK_EQ(channel_count(d, "t", "c", "in_flight_count"), 0);
}

// =====================================================================================================================
// Fuzzing
//
// Everything that reads bytes from outside, each with what must hold whatever the bytes are: a failed CHECK is a
// finding, like a crash. The table of targets is at the end. `make fuzz` has libFuzzer look for such bytes; the test
// after the table replays all seeds, and mutations of them that are always the same.
// =====================================================================================================================

namespace fuzz {

using namespace nsqd::detail;
using std::string_view;

constexpr int64_t kHour = 3600 * kSecond;
constexpr Now kStart{1000 * kSecond, 1700000000 * kSecond};

// Steps of a script for sessions: bytes from kTurn on are no input but say what happens. None of them is part of UTF-8.
constexpr uint8_t kTurn = 0xF5, kEnd = 0xFD, kSlow = 0xFE, kNext = 0xFF;  // kTurn + i: kPauses[i] pass
constexpr std::array<int64_t, 8> kPauses = {
    0, kMillisecond, 100 * kMillisecond, kSecond, 30 * kSecond, 60 * kSecond, 900 * kSecond, kHour};
std::string op(uint8_t code) { return {static_cast<char>(code)}; }
const std::string kThen = op(kTurn), kSoon = op(kTurn + 2), kLater = op(kTurn + 5), kMuchLater = op(kTurn + 7),
                  kOther = op(kNext);

nsqd::Options quiet() {
  nsqd::Options options;
  options.node_id = 1;
  options.broadcast_address = "here";
  options.max_bytes_per_file = kPageSize;
  options.mem_queue_size = 50;
  options.e2e_processing_latency_percentile = {0.5, 1.0};
  options.log_level = nsqd::Level::kDebug;
  options.log = [](string_view line) { CHECK(line.find('\n') == line.npos); };
  return options;
}
std::string id_of(int message) {  // of those that are published when time has not moved yet
  IdSource source(1);
  for (; message > 0; message--) source.next(kStart.wall);
  return {source.next(kStart.wall).text.data(), 16};
}
std::string with_body(const std::string& line, const std::string& body) {
  return line + "\n" + be32(body.size()) + body;
}

// Takes all that was said; the bytes of a page are read while they are mapped.
std::string taken(Output& out, size_t most = std::string::npos) {
  std::string all;
  std::array<iovec, 256> pieces;
  for (bool more = true; more && all.size() < most;) {
    std::string some;
    const size_t count = out.gather(pieces.data(), pieces.size());
    for (size_t i = 0; i < count; i++) some.append(static_cast<const char*>(pieces[i].iov_base), pieces[i].iov_len);
    some.resize(std::min(some.size(), most - all.size()));
    out.settle(some.size());
    more = !some.empty();
    all += some;
  }
  return all;
}

// Whole frames and nothing else. Returns the messages, without the frame's head.
std::vector<string_view> messages_in(string_view out) {
  std::vector<string_view> messages;
  while (!out.empty()) {
    CHECK(out.size() >= 8);
    const size_t size = from_be(out.substr(0, 4)), type = from_be(out.substr(4, 4));
    CHECK(size >= 4 && size <= out.size() - 4 && type <= 2);
    if (type == 2) messages.push_back(out.substr(8, size - 4));
    CHECK(type != 2 || (size > 4 + 26 && from_be(messages.back().substr(8, 2)) > 0));
    out.remove_prefix(4 + size);
  }
  return messages;
}
// Whole responses and nothing else; those to HEAD have no body.
void check_responses(string_view out) {
  while (!out.empty()) {
    CHECK_EQ(out.substr(0, 7), "HTTP/1.");
    const size_t end = out.find("\r\n\r\n");
    CHECK(end != out.npos);
    const std::string head(out.substr(0, end));
    for (size_t at = 0; (at = head.find_first_of("\r\n", at)) != head.npos; at += 2)
      CHECK_EQ(head.substr(at, 2), "\r\n");
    out.remove_prefix(end + 4);
    const size_t length = head.find("Content-Length: ");
    const size_t body = length == head.npos ? 0 : static_cast<size_t>(std::atoll(head.c_str() + length + 16));
    if (out.empty() || out.substr(0, 7) == "HTTP/1.") continue;
    CHECK(body <= out.size());
    out.remove_prefix(body);
  }
}

// Takes and finishes all that a channel has, whatever it waits for. Nothing may be left then.
Strings consume(Broker& broker, Channel& channel) {
  Port port;
  Consumer& consumer = channel.subscribe(port, Consumer::kElsewhere, 1min);
  channel.pause(false);
  channel.topic.pause(false);
  channel.set_ready(consumer, 2500);
  Strings bodies;
  for (int idle = 0; idle < 3;) {
    broker.pump();
    const std::string out = taken(port.out);
    broker.after_write();
    for (const string_view message : messages_in(out)) {
      bodies.emplace_back(message.substr(26));
      CHECK_EQ(channel.finish(consumer, MessageId::from(message.data() + 10)), "");
    }
    if (!out.empty()) continue;
    idle++;
    broker.now = {broker.now.steady + 2 * kHour, broker.now.wall + 2 * kHour};
    broker.timers.run(broker.now.steady);
  }
  CHECK_EQ(channel.depth() + channel.backend_depth() + channel.deferred_count() + channel.in_flight_count(), 0);
  channel.unsubscribe(consumer);
  return bodies;
}

// A broker in memory and its sessions, driven as the loop drives them.
struct Stage {
  struct Wire {
    char kind;  // V: a client, H: one that speaks HTTP, D: a peer that we have dialled
    std::shared_ptr<Session> session = nullptr;
    std::string input = {}, output = {};
    bool ended = false, slow = false, connected = false;
  };

  nsqd::Options options;
  Logger logger{options};
  Broker broker{options, logger, ""};
  Host host{broker, options, logger};
  std::deque<Wire> wires;
  std::unique_ptr<Cluster> cluster;

  Stage(const std::string& kinds, const nsqd::Options& with) : options(with) {
    broker.now = kStart;
    host.look_up = [this](string_view topic, Session& session) {
      return cluster != nullptr && cluster->look_up(topic, session);
    };
    host.ask_auth = [this](V2Session& session) { cluster->ask_auth(session, 0, options.auth_http_address.size()); };
    host.set_lookupds = [](const Strings&) {};
    host.connections = [this] { return wires.size(); };
    host.each_session = [this](const std::function<void(const Session&)>& visit) {
      for (Wire& wire : wires)
        if (wire.session != nullptr) visit(*wire.session);
    };
    for (const char kind : kinds) wires.push_back({kind});
  }
  ~Stage() {
    cluster.reset();
    wires.clear();
  }

  void dial(const std::shared_ptr<Session>& session) {
    const auto unused =
        std::find_if(wires.begin(), wires.end(), [](const Wire& w) { return w.kind == 'D' && w.session == nullptr; });
    Wire& wire = unused != wires.end() ? *unused : wires.emplace_back();
    wire = {'D', session};
  }
  void feed(Wire& wire, string_view bytes) {
    if (wire.session == nullptr && wire.kind == 'V')
      wire = {'V', std::make_shared<V2Session>(host, "1.2.3.4:5", "1.2.3.4")};
    if (wire.session == nullptr && wire.kind == 'H')
      wire = {'H', std::make_shared<HttpSession>(host, "1.2.3.4:5")};
    if (wire.session == nullptr || (wire.kind == 'D' && !wire.connected)) return;
    Session& session = *wire.session;
    const Port& port = session.port;
    wire.input += bytes;
    const std::vector<char> exact(wire.input.begin(),
                                  wire.input.end());  // so that a sanitizer sees who looks beyond it, or too late
    const string_view input(exact.data(), exact.size());
    size_t used = 0;
    if (!session.parked && !port.closing && !port.dropped) used = session.feed(input);
    CHECK(used <= input.size());
    if (!session.parked && !port.closing && (wire.ended || session.late))
      session.ended(input.substr(std::exchange(used, input.size())));
    wire.input.erase(0, port.closing || port.dropped ? input.size() : used);
  }
  void turn(int64_t pause = 0) {
    broker.now = {broker.now.steady + pause, broker.now.wall + pause};
    for (size_t i = 0; i < wires.size(); i++)
      if (wires[i].kind == 'D' && wires[i].session != nullptr && !std::exchange(wires[i].connected, true))
        wires[i].session->connected();
    broker.timers.run(broker.now.steady);
    for (size_t i = 0; i < wires.size(); i++) {
      const auto session = wires[i].session;
      if (session != nullptr && (session->late || wires[i].ended || std::exchange(session->resumed, false)))
        feed(wires[i], "");
    }
    broker.pump();
    for (size_t i = 0; i < wires.size(); i++) write(wires[i]);
    broker.after_write();
  }
  void write(Wire& wire) {
    if (wire.session == nullptr) return;
    Session& session = *wire.session;
    const std::string out = taken(session.port.out, wire.slow ? 5 : std::string::npos);
    wire.output += out;
    session.written += out.size();
    if (!out.empty()) session.drained();
    if (!session.port.dropped && !(session.port.closing && session.port.out.empty())) return;
    wire.output += taken(session.port.out);
    if (wire.kind == 'V') messages_in(wire.output);
    if (wire.kind == 'H') check_responses(wire.output);
    wire.output.clear();
    const auto gone = std::move(wire.session);
    wire.session = nullptr;
  }

  void play(string_view script) {
    std::string piece;
    size_t at = 0;
    for (const char c : std::string(script) + op(kTurn)) {
      const auto code = static_cast<uint8_t>(c);
      if (code < kTurn) piece += c;
      if (code < kTurn) continue;
      feed(wires[at], std::exchange(piece, ""));
      if (code == kEnd) wires[at].ended = true;
      if (code == kSlow) wires[at].slow = !wires[at].slow;
      turn(code < kEnd ? kPauses[code - kTurn] : 0);
      if (code == kNext) at = (at + 1) % wires.size();
    }
    for (const char kind : {'D', 'V', 'H'}) {  // the end of all, in an order in which nobody may be left waiting
      for (int i = 0; i < 8; i++) {
        for (Wire& wire : wires) wire.ended = wire.ended || wire.kind == kind;
        for (Wire& wire : wires) wire.slow = false;
        turn(kind == 'D' ? kSecond : 0);
      }
      for (const Wire& wire : wires) CHECK(wire.session == nullptr || !wire.session->parked);
      for (const Wire& wire : wires) CHECK(kind == 'D' || wire.kind != kind || wire.session == nullptr);
    }
    const std::string stats = stats_json(take_stats(host, {}), {"", "", true, false}, true);
    JsonParser parser(stats);
    parser.parse();
    CHECK_EQ(parser.error, "");
    for (const auto& [name, topic] : broker.topics) {
      CHECK(topic->depth() >= 0);
      for (const auto& [channel_name, channel] : topic->channels)
        if (!channel->ephemeral) consume(broker, *channel);
    }
  }
};

void tcp(string_view in) { Stage("VVH", quiet()).play(in); }
void http(string_view in) { Stage("HVH", quiet()).play(in); }
// The first connection is a client's, the others are nsqlookupd's and the auth server's.
void peer(string_view in) {
  nsqd::Options options = quiet();
  options.lookupd_tcp_address = {"lookup:1"};
  options.auth_http_address = {"auth:1"};
  Stage stage("V", options);
  stage.cluster = std::make_unique<Cluster>(
      stage.broker, [&stage](const std::string&, const std::shared_ptr<Session>& to) { stage.dial(to); });
  stage.broker.on_change = [&stage](const Topic& topic, const Channel* channel, bool created) {
    stage.cluster->tell(topic, channel, created);
  };
  stage.cluster->set_peers(options.lookupd_tcp_address);
  stage.play(in);
  stage.broker.on_change = nullptr;
}

void pattern(string_view in) {
  const Pattern pattern{std::string(in)};
  for (const char* name : {"orders", "orders.eu-1_x#ephemeral", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"})
    CHECK(pattern.valid() || !pattern.matches(name));
}

// Written by the writer and read again, it is the same.
void write_json(JsonWriter& json, const Json& value) {
  using Type = Json::Type;
  if (value.is(Type::kNull)) json.raw("null");
  if (value.is(Type::kBool)) json.value(value.boolean);
  if (value.is(Type::kNumber)) json.raw(value.string);
  if (value.is(Type::kString)) json.value(value.string);
  if (!value.is(Type::kArray) && !value.is(Type::kObject)) return;
  json.open(value.is(Type::kArray) ? '[' : '{');
  for (size_t i = 0; i < value.items.size(); i++) {
    if (value.is(Type::kObject)) json.key(value.keys[i]);
    write_json(json, value.items[i]);
  }
  json.close(value.is(Type::kArray) ? ']' : '}');
}
void json(string_view in) {
  std::string before(in);
  for (int round = 0; round < 3; round++) {
    JsonParser parser(before);
    const Json value = parser.parse();
    if (round == 0 && !parser.error.empty()) return CHECK_HAS(parser.error, " at line ");
    CHECK_EQ(parser.error, "");
    JsonWriter writer;
    write_json(writer, value);
    if (round == 2) CHECK_EQ(writer.out, before);
    before = writer.out;
  }
}

// Options are refused with a reason, or can be shown: some of them, another part for inputs of another length.
void check_options(const Strings& arguments, const std::string& file, size_t length) {
  try {
    nsqd::Options options = options_of(arguments);
    complete_options(options);
    for (size_t i = length % 10; i < std::size(nsqd::detail::flags()); i += 10) {
      const auto shown = show_option(options, nsqd::detail::flags()[i].key());
      JsonParser parser(shown ? string_view(shown->value) : "null");
      if (shown && shown->json) parser.parse();
      CHECK_EQ(parser.error, "");
    }
  } catch (const nsqd::EarlyExit& refused) {
    CHECK(refused.what() != std::string() && refused.status == (refused.to_stdout ? 0 : 2));
  } catch (const Failed&) {
    throw;
  } catch (const std::runtime_error& refused) {
    const std::string why = refused.what();
    CHECK(why.find(file) != why.npos || why.find("failed to instantiate") == 0 || why.find("Could not parse") == 0);
  }
}
void flags(string_view in) {
  Strings arguments;
  for (string_view rest = in.substr(0, in.find('\0')); !rest.empty();) arguments.emplace_back(cut(rest, '\n'));
  for (const auto& argument : arguments)
    if (argument.find("config") != argument.npos) return;  // there is a target for files
  check_options(arguments, "", in.size());
}

// A folder of this process, in memory where that can be had.
const std::string& data_path() {
  struct Folder {
    std::string path =
        (::access("/dev/shm", W_OK) == 0 ? "/dev/shm" : std::filesystem::temp_directory_path().string()) +
        "/nsqd-fuzz.XXXXXX";
    Folder() { CHECK(mkdtemp(path.data()) != nullptr); }
    ~Folder() { std::filesystem::remove_all(path); }
  };
  static const Folder folder;
  return folder.path;
}
void put(const std::string& name, string_view content) {
  const Fd file(::open((data_path() + "/" + name).c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600));
  CHECK(file && write_whole(file.get(), content, name).ok());
}
const std::string kNames =
    "{\"topics\":[{\"name\":\"t\",\"paused\":false,\"channels\":[{\"name\":\"c\",\"paused\":false}]}],\"version\":\"1."
    "3.0\"}";
const std::string kSegment = "t.00000000000000000000.segment", kLedger = "t:c.ledger";

void config(string_view in) {
  put("nsqd.cfg", in);
  check_options({"--config=" + data_path() + "/nsqd.cfg"}, data_path(), in.size());
}

// Starts on these files, consumes all, and starts again: what came was whole and is finished, and what was published
// since has come, too. Returns the bodies.
Strings recovered(const std::vector<std::pair<std::string, string_view>>& content) {
  for (const auto& name : files(data_path())) ::unlink((data_path() + "/" + name).c_str());
  for (const auto& [name, bytes] : content) put(name, bytes);
  Strings bodies;
  for (const string_view more : {"more", "again"}) {
    const nsqd::Options options = quiet();
    Logger logger(options);
    Broker broker(options, logger, data_path());
    broker.now = kStart;
    try {
      Recovery(broker).run();
    } catch (const std::runtime_error& refused) {
      if (dynamic_cast<const Failed*>(&refused) != nullptr) throw;
      CHECK_HAS(refused.what(), data_path());
      CHECK_EQ(more, "more");
      return {};
    }
    Status status;
    Topic& topic = broker.topic("t");
    Channel* const channel = topic.channel("c", status);
    CHECK(channel != nullptr && topic.publish(&more, 1, 0).ok());
    Strings came = consume(broker, *channel);
    const auto last = std::find(came.begin(), came.end(), more);
    CHECK(last != came.end());
    came.erase(last);
    if (more == "more")
      bodies = came;
    else
      CHECK_EQ(came, Strings());
    put("nsqd.dat", broker.metadata().json());
    broker.close();
  }
  return bodies;
}

// What a daemon leaves: one message finished, one in flight, one put off, one requeued, two that wait; one of these is
// deferred.
std::map<std::string, std::string> stored() {
  for (const auto& name : files(data_path())) ::unlink((data_path() + "/" + name).c_str());
  const nsqd::Options options = quiet();
  Logger logger(options);
  Broker broker(options, logger, data_path());
  broker.now = kStart;
  Status status;
  Topic& topic = broker.topic("t");
  Channel& channel = *topic.channel("c", status);
  Port port;
  Consumer& consumer = channel.subscribe(port, Consumer::kElsewhere, 1min);
  const std::array<string_view, 6> bodies = {"zero", "one", "two", "three", "four", "five"};
  for (size_t i = 0; i < bodies.size(); i++) CHECK(topic.publish(&bodies[i], 1, i == 4 ? kHour : 0).ok());
  channel.set_ready(consumer, 4);
  broker.pump();
  const std::string out = taken(port.out);
  const auto messages = messages_in(out);
  CHECK_EQ(channel.finish(consumer, MessageId::from(messages[0].data() + 10)), "");
  CHECK_EQ(channel.requeue(consumer, MessageId::from(messages[2].data() + 10), kHour / 2), "");
  channel.set_ready(consumer, 0);
  CHECK_EQ(channel.requeue(consumer, MessageId::from(messages[3].data() + 10), 0), "");
  broker.close();
  return {{kSegment, read_file(data_path() + "/" + kSegment)}, {kLedger, read_file(data_path() + "/" + kLedger)}};
}

// The first byte says whether the checksums are made to fit, the second how many slots the end of the input is. The
// rest is the begin of the file; zeros between them fill a page.
void segment(string_view in) {
  if (in.size() < 2 || in.size() > kPageSize) return;
  const bool fits = in[0] != 0;
  const size_t slots = std::min<size_t>(static_cast<uint8_t>(in[1]), (in.size() - 2) / 8),
               end = in.size() - 2 - 8 * slots;
  std::string file(kPageSize, '\0');
  in.copy(file.data(), end, 2);
  in.copy(file.data() + file.size() - 8 * slots, 8 * slots, 2 + end);
  if (fits) store(&file[32], checksum(0, file.data(), 32));
  for (size_t i = 0; fits && i < slots; i++) {
    char* const slot = file.data() + file.size() - 8 * (i + 1);
    const size_t at = load<uint32_t>(slot) & 0x7FFFFFFF, begin = at - (load<uint32_t>(slot) != at ? 8 : 0);
    if (at < 64 || at > file.size() - 64) continue;
    put_be(file.data() + at + 4, uint32_t{2});  // only what was written as a message has a sum that fits
    put_be(file.data() + at + 16, uint16_t{1});
    const size_t size = at - begin + 4 + from_be(string_view(file).substr(at, 4));
    const int64_t due = begin < at ? load<int64_t>(&file[begin]) : 0;
    if (size >= 38 && size <= file.size() - begin) store(slot + 4, nsqd::detail::Segment::sum(i, &file[at], due));
  }
  for (const auto& body : recovered({{"nsqd.dat", kNames}, {kSegment, file}})) CHECK(file.find(body) != file.npos);
}
// The bits of the first byte make the numbers of slots fit, say that the machine has run since, and make the total fit.
void ledger(string_view in) {
  static const std::string messages = stored().at(kSegment);
  static const std::string boot = read_file("/proc/sys/kernel/random/boot_id");
  if (in.empty() || in.size() > kPageSize) return;
  std::string file(kPageSize, '\0');
  in.copy(file.data(), in.size() - 1, 1);
  const auto seal = [&](size_t at) {
    if (const auto word = load<uint64_t>(&file[at])) store(&file[at], Ledger::sealed(word >> 16 & 15));
  };
  for (size_t at = Ledger::kSlots; (in[0] & 1) != 0 && at < kPageSize; at += Ledger::kSlot) seal(at);
  for (const size_t at : {Ledger::kCursor, Ledger::kSafe})
    if ((in[0] & 1) != 0) seal(at);
  if ((in[0] & 2) != 0) store(&file[Ledger::kBoot], uint64_t{checksum(1, boot.data(), boot.size())});
  if ((in[0] & 4) != 0)
    store(&file[Ledger::kTotal],
          checksum(load<uint64_t>(&file[Ledger::kCursor]), &file[Ledger::kSlots], file.size() - Ledger::kSlots));
  for (const auto& body : recovered({{"nsqd.dat", kNames}, {kSegment, messages}, {kLedger, file}}))
    CHECK(messages.find(body) != messages.npos);
}
void metadata(string_view in) {
  if (recovered({{"nsqd.dat", in}}) != Strings()) fail(__LINE__, "a message out of nothing");
  CHECK_EQ(Metadata::parse(kNames, "").json(), kNames);
}
// Whose queue, then its metadata and files, with a line "--" between them.
void diskqueue(string_view in) {
  if (in.empty()) return;
  const std::string queue = in[0] == 't' ? "t" : "t:c";
  string_view rest = in.substr(1);
  std::vector<std::pair<std::string, string_view>> content = {{"nsqd.dat", kNames}};
  for (const char* name : {"meta", "000000", "000001", "9223372036854775807"}) {
    const string_view part = take_front(rest, rest.find("\n--\n"));
    rest.remove_prefix(std::min<size_t>(4, rest.size()));
    content.emplace_back(queue + ".diskqueue." + name + ".dat", part);
  }
  for (const auto& body : recovered(content)) CHECK(in.find(body) != in.npos);
}

// ---- Seeds: good examples, and what was found once

std::string frame(const std::string& data) { return be32(data.size()) + data; }
std::string request(const std::string& line, const std::string& body = "", const std::string& headers = "") {
  const std::string length = body.empty() ? "" : "Content-Length: " + std::to_string(body.size()) + "\r\n";
  return line + " HTTP/1.1\r\nHost: here\r\n" + headers + length + "\r\n" + body;
}
std::string answer(const std::string& body, const std::string& headers = "") {
  return "HTTP/1.1 200 OK\r\n" + headers + "\r\n" + body;
}

Strings tcp_seeds() {
  const std::string hello =
      "  V2" +
      with_body("IDENTIFY",
                "{\"client_id\":\"a\",\"msg_timeout\":2000,\"heartbeat_interval\":1000,\"feature_negotiation\":true}");
  const std::string many = with_body("MPUB t", be32(2) + frame("two") + frame(std::string(700, '3')));
  const std::string ids =
      "FIN " + id_of(0) + "\nREQ " + id_of(1) + " 50\nTOUCH " + id_of(2) + "\nREQ " + id_of(2) + " 0\n";
  return {
      hello + "SUB t c\nRDY 5\n" + kThen + with_body("PUB t", "one") + many + with_body("DPUB t 1000", "later") +
          kThen + ids + kSoon + "NOP\nCLS\nFIN " + id_of(2) + "\n" + kLater + "FIN " + id_of(3) + "\n",
      hello + "SUB t c#ephemeral\nRDY 1\n" + kOther + "  V2" + with_body("PUB t", "one") + many + kOther +
          request("GET /stats?format=json") + request("POST /channel/pause?topic=t&channel=c%23ephemeral") + kLater +
          kOther + op(kEnd) + kMuchLater,
      "  V2" + with_body("IDENTIFY", "{\"sample_rate\":50,\"output_buffer_size\":-1,\"heartbeat_interval\":-1}") +
          many + "SUB t c\n",
      "  V2" + with_body("IDENTIFY", "{\"sample_rate\":9}") + "SUB t c\nRDY 2500\n" + kOther + "  V2" + many + many +
          with_body("PUB t", std::string(60, 'x')) + kThen + kOther + request("POST /channel/empty?topic=t&channel=c") +
          request("POST /topic/delete?topic=t"),
      hello + "SUB t c\nRDY 100\n" + op(kSlow) + many + many + kSoon + "FIN " + id_of(3) + "\nRDY 0\n" + op(kEnd) +
          kOther + "  V2SUB t c\nRDY 9\n" + kLater + kLater,
      "  V1",
      "  V2PUB t\n" + be32(0x80000001),
      "  V2NO\n",
      "  V2SUB t\n",
      "  V2SUB t c\nSUB t c\n",
      "  V2AUTH\n" + frame("x"),
  };
}
Strings http_seeds() {
  const std::string chunked =
      "POST /pub?topic=t HTTP/1.1\r\nHost: here\r\nExpect: 100-continue\r\nTransfer-Encoding: "
      "chunked\r\n\r\n3;x=y\r\nabc\r\n0A\r\n0123456789\r\n0\r\nA: b\r\n\r\n";
  std::string all, config;
  for (const char* line :
       {"POST /topic/create?topic=t", "POST /channel/create?topic=t&channel=c", "POST /topic/pause?topic=t",
        "POST /topic/unpause?topic=t", "POST /channel/pause?topic=t&channel=c",
        "POST /channel/unpause?topic=t&channel=c", "POST /channel/empty?topic=t&channel=c", "GET /ping", "GET /info",
        "GET /stats", "GET /stats?format=json&topic=t&channel=c&include_clients=0&include_mem=false", "GET /metrics",
        "POST /topic/empty?topic=t", "POST /channel/delete?topic=t&channel=c", "POST /topic/delete?topic=t"})
    all += request(line);
  for (const Flag& flag : nsqd::detail::flags()) config += request("GET /config/" + flag.key());
  return {
      all,
      config,
      chunked + chunked + kThen + request("GET /stats"),
      request("POST /pub?topic=t&defer=1000", "one") + request("POST /mpub?topic=t", "a\nb\n\nc") +
          request("POST /mpub?topic=t&binary=true", be32(2) + frame("x") + frame("yy")) + kOther +
          "  V2SUB t c\nRDY 2\n" + kOther + request("GET /stats") + kLater,
      request("PUT /config/log_level", "debug") + request("PUT /config/nsqlookupd_tcp_addresses", "[\"a:1\"]"),
      request("GET /", "", "Accept: text/html\r\n") + request("OPTIONS *") + request("HEAD /ping") +
          request("PUT /ping") + request("GET //Ping/../ping?a=%20+b") + request("GET /config//%61%0a") +
          request("GET //ping?a\rb"),
      request("POST /topic/create?topic=t", "", "Origin: http://here\r\nSec-Fetch-Site: same-origin\r\n") +
          "GET http://here/ping HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /ping HTTP/1.0\n\n",
      request("POST /pub?topic=%zz", "a") + "BAD\r\n\r\n",
      request("POST /pub?topic=t", "", "Content-Length: 99999999\r\n"),
      request("GET /ping", "", "Content-Length: 1\r\nContent-Length: 2\r\n"),
  };
}
Strings peer_seeds() {
  const std::string hello = "  V2" + with_body("AUTH", "secret") + kOther,
                    told = frame("{\"broadcast_address\":\"lookup\",\"http_port\":4161}") + kOther;
  const auto granted = [](const std::string& patterns) {
    return answer("{\"ttl\":60,\"identity\":\"me\",\"identity_url\":\"u\",\"authorizations\":[{\"topic\":\"" +
                  patterns + "\",\"channels\":[\".*\"],\"permissions\":[\"publish\",\"subscribe\"]}]}") +
           op(kEnd);
  };
  const std::string channels = answer("{\"channels\":[\"c\",\"d\",\"x#ephemeral\",1]}");
  const std::string pub = with_body("PUB t", "one"),
                    chunked = answer("e\r\n{\"channels\":[]\r\n1\r\n}\r\n0\r\n\r\n", "Transfer-Encoding: chunked\r\n");
  return {hello + told + granted("^t$") + kOther + pub + kOther + frame("OK") + kOther + channels + op(kEnd) + kOther +
              "SUB t c\n" + kLater + pub,
          hello + told + granted("\\\\w+[\\\\d-]*(?:x)?") + kOther + "SUB t c\nRDY 1\n" + kOther + kOther + chunked,
          hello + told + "HTTP/1.1 403 Forbidden\r\n\r\n" + op(kEnd),
          hello + kLater + kMuchLater,
          hello + told + answer("{}", "Content-Length: 2\r\n"),
          hello + frame("E_BAD") + kLater};
}
Strings pattern_seeds() {
  std::string nested = std::string(20, '(') + "a";
  for (int i = 0; i < 20; i++) nested += ")+";
  return {"^orders$",
          ".*",
          "[a-z]+\\.eu(?:-\\d)?",
          "[\\w\\-\\].]*|x{2,3}",
          "(a|b)*c\\S",
          "\\",
          "[",
          "(((a{255}){255}){255}){255}",
          nested,
          "()()\\w+b*(||(||){0,9}()b*)+",
          "(((((((||||||||)+)(()+)+)+)+)+\\w+||)+)(()+)+)+",
          std::string(13, '(') + nested.substr(21),
          "(a*)*\\1b",
          "\\d" + std::string(24, '+') + "d",
          std::string(60, '('),
          "[[:alpha:]]{1,64}[^]a]+"};
}
Strings json_seeds() {
  return {"{\"a\":[1,-2.5e+3,true,false,null,\"\\u00e9\\ud83d\\ude00\\n<\xE2\x80\xA8\"],\"b\":{\"c\":{}},\"\":[]}",
          std::string(70, '['),
          " 0 ",
          "\"\xff\\ud800\"",
          "{\"a\":1,}",
          "[1e5,01]"};
}
// What the function says of each flag that is a setting, five of them in a seed; then the seeds that are given.
Strings of_all_flags(std::string (*line)(const Flag&), const Strings& others) {
  Strings seeds;
  for (const Flag& flag : nsqd::detail::flags()) {
    if (!show_option(nsqd::Options(), flag.key())) continue;  // it is no setting
    if (seeds.empty() || std::count(seeds.back().begin(), seeds.back().end(), '\n') == 5) seeds.emplace_back();
    seeds.back() += line(flag) + "\n";
  }
  seeds.insert(seeds.end(), others.begin(), others.end());
  return seeds;
}
Strings config_seeds() {
  const auto line = [](const Flag& flag) {
    const bool words = flag.sets<std::string>() || flag.sets<Texts>();
    return flag.key() + " = " +
           (words                  ? "\"x\""
            : flag.sets<Numbers>() ? "[0.5, 1.0]"
            : flag.is_bool()       ? "false"
                                   : "1_000");
  };
  return of_all_flags(line, {"# a\nmsg_timeout = \"1h2m3.5s\" # b\nnsqlookupd_tcp_addresses = [\n  \"a:1\", # c\n  "
                             "'b:2',\n]\n[table]\nx = 1\n[[list]]\ny.\"z\" = { a = 0x1F, b = 1.5 }\nw = 1979-05-27\n",
                             "e2e_processing_latency_percentiles = [nan, 1.0]\nlog_level = \"debug\"\nid = -1",
                             "a = \"\\u0041", "a = [1, 2", "a"});
}
Strings flags_seeds() {
  std::string nans = "--e2e-processing-latency-percentile=";
  for (int i = 0; i < 20; i++) nans += i % 3 == 0 ? "nan," : "0.5,1,";
  const auto line = [](const Flag& flag) { return "--" + std::string(flag.name) + "=" + show_option(nsqd::Options(), flag.key())->value; };
  return of_all_flags(line,
                      {nans + "1", "-tcp-address\n1.2.3.4:5\n--mem-only\n--sync-every=0x_10\n--\nx",
                       "--msg-timeout=1h2m3.000000001s\n--max-msg-timeout=-1.5us", "--help", "-version", "--mem-onyl",
                       "--log-level=WARN\n-snappy=f", "--=x", "-e2e-processing-latency-percentile=0.5,x"});
}
Strings segment_seeds() {
  const std::string file = stored().at(kSegment), slots = file.substr(file.size() - 48),
                    frames = file.substr(0, file.find("five") + 4);
  const std::string twice = std::string(slots).replace(slots.size() - 16, 4, slots, slots.size() - 8, 4);
  return {op(0) + op(6) + frames + slots, op(1) + op(6) + frames + slots,
          op(0) + op(5) + frames.substr(0, frames.size() - 3) + slots.substr(8), op(1) + op(2) + std::string(90, 'x'),
          op(1) + op(6) + frames + twice};
}
Strings ledger_seeds() {
  const std::string file = stored().at(kLedger);
  Strings seeds;
  for (uint8_t how = 0; how < 8; how++) seeds.push_back(op(how) + file.substr(0, file.find_last_not_of('\0') + 1));
  std::string gap = file.substr(0, Ledger::kSlots + 11 * Ledger::kSlot);  // one that goes beyond what is stored
  char* const slot = &gap[gap.size() - Ledger::kSlot];
  store(slot, Ledger::sealed(5));
  store(slot + 8, uint64_t{100});
  store(slot + 18, Ledger::kGap);
  seeds.push_back(op(2) + gap);
  return seeds;
}
Strings metadata_seeds() {
  return {kNames,
          "{\"topics\":[{\"name\":\"t\",\"paused\":true,\"channels\":null},{\"name\":\"t\",\"channels\":[{\"name\":"
          "\"c\",\"paused\":true},{\"name\":\"e#ephemeral\",\"paused\":false},{\"name\":\"a/b\"}]},"
          "{\"name\":\"e#ephemeral\",\"paused\":false,\"channels\":[]}],\"version\":\"1.3.0\"}",
          "{\"topics\":null}",
          "{}",
          "[]",
          "{\"topics\":[{\"name\":1}]}"};
}
Strings diskqueue_seeds() {
  const std::string one = disk_records("m", 0, 4), two = disk_records("m", 4, 6), all = "\n--\n" + one + "\n--\n" + two,
                    read = std::to_string(one.size() / 4);
  return {"t6\n0,0\n1," + std::to_string(two.size()) + "\n" + all,
          "c5\n0," + read + "\n1,99\n" + all,
          "c2\n1,0\n1,1\n" + all,
          "t" + all,
          "c1\n0,7\n0,1\n" + all,
          "t0\n9,0\n9,0\n" + all,
          "t2\n9223372036854775807,0\n0,0\n" + all + "\n--\n" + one,
          "t1\n0,0\n0,1\n\n--\n" + one.substr(0, 50),
          "c1\n0,0\n0,1\n\n--\n" + disk_record(id_of(0), std::numeric_limits<int64_t>::min() + 5, 1, "x")};
}

struct Target {
  const char* name;
  int longest;  // input, in bytes
  void (*run)(string_view);
  Strings (*seeds)();
};
constexpr std::array<Target, 11> kTargets = {{
    {"tcp", 4096, tcp, tcp_seeds},
    {"http", 8192, http, http_seeds},
    {"peer", 2048, peer, peer_seeds},
    {"pattern", 64, pattern, pattern_seeds},
    {"json", 512, json, json_seeds},
    {"config", 512, config, config_seeds},
    {"flags", 256, flags, flags_seeds},
    {"segment", 1024, segment, segment_seeds},
    {"ledger", 512, ledger, ledger_seeds},
    {"metadata", 1024, metadata, metadata_seeds},
    {"diskqueue", 1024, diskqueue, diskqueue_seeds},
}};

// As an engine does it: some bits turned, bytes replaced, parts cut out, doubled, or taken from another input.
std::string mutated(std::string bytes, const std::string& other, uint32_t& dice) {
  const auto random = [&dice](size_t below) {
    dice ^= dice << 13;
    dice ^= dice >> 17;
    dice ^= dice << 5;
    return dice % std::max<size_t>(below, 1);
  };
  for (size_t changes = 1 + random(3); changes > 0 && !bytes.empty(); changes--) {
    const size_t at = random(bytes.size()), size = 1 + random(std::min<size_t>(bytes.size() - at, 40));
    switch (random(5)) {
      case 0:
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << random(8)));
        break;
      case 1:
        bytes[at] = static_cast<char>(random(256));
        break;
      case 2:
        bytes.erase(at, size);
        break;
      case 3:
        bytes.insert(at, bytes.substr(at, size));
        break;
      default:
        bytes.insert(at, other, random(other.size()), size);
    }
  }
  return bytes;
}

}  // namespace fuzz

// Each turn costs with every connection: with a turn for each heartbeat, a thousand clients would take 3 % of a core.
TEST(clients_who_came_at_any_time_get_their_heartbeats_together) {
  constexpr size_t kClients = 100;
  constexpr int64_t kStep = fuzz::kSecond / 10;
  fuzz::Stage stage(std::string(kClients, 'V'), fuzz::quiet());
  std::vector<int64_t> beats(kClients, fuzz::kStart.steady);
  size_t turns = 0;
  for (size_t i = 0; i < 2400; i++) {  // four minutes, of which the last are watched
    if (i % 3 == 0 && i / 3 < kClients) stage.feed(stage.wires[i / 3], "  V2");
    if (i >= 1200 && stage.broker.timers.next() <= stage.broker.now.steady + kStep) turns++;
    stage.turn(kStep);
    for (size_t at = 0; at < kClients; at++) {
      auto& wire = stage.wires[at];
      if (wire.output.empty()) continue;
      CHECK_HAS(std::exchange(wire.output, ""), "_heartbeat_");
      stage.feed(wire, "NOP\n");
      beats[at] = stage.broker.now.steady;
    }
  }
  CHECK(turns > 0 && turns <= 40);  // in two minutes, for 400 heartbeats
  for (size_t at = 0; at < kClients; at++)
    CHECK(stage.wires[at].session != nullptr && stage.broker.now.steady - beats[at] < 38 * fuzz::kSecond);
}

TEST(fuzzing_finds_nothing_in_a_few_mutations_of_every_seed) {
  for (const fuzz::Target& target : fuzz::kTargets) {
    const Strings seeds = target.seeds();
    uint32_t dice = 2463534242U;
    for (size_t i = 0; i < 400; i++) {
      const std::string& seed = seeds[i % seeds.size()];
      const std::string input =
          i < seeds.size() ? seed : fuzz::mutated(seed, seeds[(i / seeds.size()) % seeds.size()], dice);
      try {
        target.run(input);
      } catch (const std::exception& error) {
        fail(__LINE__, std::string(target.name) + " with " + show(input) + ": " + error.what());
      }
    }
  }
}

}  // namespace

// =====================================================================================================================
// bench: how fast is it?  ./test bench --help
//
// One load generator for every scenario: a thread that polls its connections, reads much at once, parses frames in
// place and answers all of one read with one send, so that it costs less than the daemons it measures. Messages have
// 200 bytes. Each scenario gets a fresh daemon with an empty data path, or shares the one at a given address.
//
//   Side                      what is measured: a binary with its flags, or an address
//   Daemon                    one running instance of it
//   Client                    one connection: a producer with a window, a consumer that finishes what it gets
//   publish, flow, latency    the three kinds of load
//   kScenarios                the rows of the table, made of these
//   bench_main                options, rounds, medians, table
// =====================================================================================================================


namespace {
namespace bench {

using Clock = std::chrono::steady_clock;
using Names = std::vector<std::string>;

constexpr size_t kBody = 200;             // bytes in a message
constexpr size_t kBatch = 200;            // messages in an MPUB
constexpr size_t kBigInput = 512 << 10;   // of a working connection: most of a full RDY of messages in one read
constexpr size_t kSmallInput = 1 << 10;   // of an idle one: the answer to IDENTIFY
constexpr int kStall = 20;                // seconds without any answer after which a run has failed

volatile std::sig_atomic_t interrupted = 0;  // by SIGINT or SIGTERM: a run ends, its daemon and folder are cleaned up

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }
[[noreturn]] void fail_errno(const std::string& what) { fail(what + ": " + std::strerror(errno)); }

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }
int64_t nanoseconds(Clock::time_point time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
}
void sleep_for(double seconds) {
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  if (interrupted) fail("interrupted");
}

uint32_t be32(const char* p) {
  uint32_t value;
  std::memcpy(&value, p, sizeof value);
  return ntohl(value);
}
std::string be32_text(size_t value) {
  const uint32_t order = htonl(static_cast<uint32_t>(value));
  return std::string(reinterpret_cast<const char*>(&order), sizeof order);
}

// ---- Connections ----------------------------------------------------------------------------------------------------

sockaddr_in parse_address(const std::string& text) {
  const size_t colon = std::min(text.rfind(':'), text.size());
  addrinfo hints{}, *found = nullptr;
  hints.ai_family = AF_INET;
  hints.ai_socktype = SOCK_STREAM;
  if (colon == text.size() || getaddrinfo(text.substr(0, colon).c_str(), &text[colon + 1], &hints, &found) != 0)
    fail("not an address (HOST:PORT): " + text);
  sockaddr_in address;
  std::memcpy(&address, found->ai_addr, sizeof address);
  freeaddrinfo(found);
  return address;
}

/// A TCP socket that is closed with the object. Writing blocks; a peer that takes nothing for long is a failure.
struct Socket {
  int fd = socket(AF_INET, SOCK_STREAM, 0);

  Socket() {
    if (fd < 0) fail_errno("socket");
  }
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  ~Socket() { close(fd); }

  bool connect_to(const sockaddr_in& address) const {
    const int on = 1;
    const timeval limit{kStall, 0};
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    return connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
  }

  void write(const char* data, size_t size) const {
    while (size > 0) {
      const ssize_t n = send(fd, data, size, MSG_NOSIGNAL);
      if (n < 0 && errno == EINTR && !interrupted) continue;
      if (n < 0) fail_errno("send");
      data += n;
      size -= static_cast<size_t>(n);
    }
  }
  void write(const std::string& bytes) const { write(bytes.data(), bytes.size()); }
};

/// One connection over TCP. It counts what comes in; as a producer it keeps a window of commands outstanding, as a
/// consumer it finishes each message, and it always answers heartbeats.
class Client {
 public:
  uint64_t responses = 0, messages = 0;
  std::vector<double>* latencies = nullptr;  // if set: seconds from the time in each body until now

  /// Sends the magic, IDENTIFY with these further settings, and the commands of `hello`; their responses are awaited
  /// by await.
  Client(const sockaddr_in& to, size_t input_size, const std::string& settings, const std::string& hello)
      : input_(new char[input_size]), capacity_(input_size) {
    if (!socket_.connect_to(to)) fail_errno("connect");
    const std::string json = "{\"client_id\":\"bench\",\"feature_negotiation\":true" + settings + "}";
    say("  V2IDENTIFY\n" + be32_text(json.size()) + json + hello);
  }

  int fd() const { return socket_.fd; }
  void say(const std::string& bytes) const { socket_.write(bytes); }

  /// Waits until `count` responses have come, and starts to count anew.
  void await(uint64_t count) {
    for (pollfd ready{fd(), POLLIN, 0}; responses < count; serve())
      if (poll(&ready, 1, kStall * 1000) <= 0) fail("no answer");
    responses = 0;
  }

  /// From now on keeps `window` commands outstanding, while there is any left of the budget, which producers share.
  void produce(const std::string& command, size_t window, uint64_t* budget) {
    command_size_ = command.size();
    window_ = window;
    budget_ = budget;
    for (size_t i = 0; i < window; ++i) commands_ += command;
    refill();
  }

  /// Reads once, without waiting, and answers.
  void serve() {
    const ssize_t n = recv(fd(), input_.get() + have_, capacity_ - have_, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) fail("lost a connection");
    have_ += static_cast<size_t>(n);
    size_t at = 0;
    while (have_ - at >= 8) {
      const size_t size = be32(&input_[at]) + size_t{4};
      if (size > capacity_) fail("a frame of " + std::to_string(size) + " bytes");
      if (have_ - at < size) break;
      take(&input_[at], size);
      at += size;
    }
    have_ -= at;
    std::memmove(&input_[0], &input_[at], have_);
    send_fins();
    refill();
  }

 private:
  static constexpr size_t kFins = 4096;  // in one send at most
  static constexpr size_t kFinSize = sizeof "FIN 0123456789abcdef\n" - 1;

  void take(const char* frame, size_t size) {  // size, type, then for a message: timestamp, attempts, id, body
    const uint32_t type = be32(frame + 4);
    if (type == 2) {
      ++messages;
      if (latencies != nullptr) {
        int64_t sent;
        std::memcpy(&sent, frame + 34, sizeof sent);
        latencies->push_back(static_cast<double>(nanoseconds(Clock::now()) - sent) * 1e-9);
      }
      while (fins_.size() < kFins * kFinSize) fins_ += "FIN 0123456789abcdef\n";
      if (fin_count_ == kFins) send_fins();
      std::memcpy(&fins_[fin_count_++ * kFinSize + 4], frame + 18, 16);
    } else if (type == 1) {
      fail("the daemon answered " + std::string(frame + 8, size - 8));
    } else if (size == 19 && std::memcmp(frame + 8, "_heartbeat_", 11) == 0) {
      say("NOP\n");
    } else {
      ++responses;
    }
  }

  void send_fins() {
    socket_.write(fins_.data(), fin_count_ * kFinSize);
    fin_count_ = 0;
  }

  void refill() {
    if (budget_ == nullptr) return;
    const uint64_t count = std::min<uint64_t>(window_ - (sent_ - responses), *budget_);
    *budget_ -= count;
    sent_ += count;
    socket_.write(commands_.data(), count * command_size_);
  }

  Socket socket_;
  std::unique_ptr<char[]> input_;
  size_t capacity_, have_ = 0;
  std::string fins_;  // kFins commands, in which only the ids change
  size_t fin_count_ = 0;
  std::string commands_;  // `window_` commands, ready to send
  size_t command_size_ = 0, window_ = 0;
  uint64_t sent_ = 0;
  uint64_t* budget_ = nullptr;
};

using Clients = std::vector<std::unique_ptr<Client>>;

std::vector<pollfd> pollfds(const Clients& clients) {
  std::vector<pollfd> fds;
  for (const auto& client : clients) fds.push_back({client->fd(), POLLIN, 0});
  return fds;
}

/// Serves the clients until `done`, which is asked before each turn.
template <typename Done>
void drive(const Clients& clients, Done done) {
  std::vector<pollfd> fds = pollfds(clients);
  auto last_news = Clock::now();
  while (!done()) {
    const int ready = poll(fds.data(), static_cast<nfds_t>(fds.size()), 100);
    if (interrupted) fail("interrupted");
    if (ready > 0) last_news = Clock::now();
    if (seconds_since(last_news) > kStall) fail("nothing came for a long time");
    for (size_t i = 0; ready > 0 && i < fds.size(); ++i)
      if (fds[i].revents != 0) clients[i]->serve();
  }
}

/// A keep-alive HTTP connection.
class Http {
 public:
  explicit Http(const sockaddr_in& to) {
    if (!socket_.connect_to(to)) fail_errno("connect (HTTP)");
  }

  /// One request; returns the answer, head and body. Any status but 200 is a failure.
  std::string call(const std::string& method, const std::string& path) const {
    socket_.write(method + " " + path + " HTTP/1.1\r\nHost: bench\r\nContent-Length: 0\r\n\r\n");
    std::string answer;
    char part[4096];
    while (!complete(answer)) {
      const ssize_t n = recv(socket_.fd, part, sizeof part, 0);
      if (n <= 0) fail(path + ": no answer");
      answer.append(part, static_cast<size_t>(n));
    }
    if (answer.compare(8, 5, " 200 ") != 0) fail(path + ": " + answer.substr(0, answer.find('\r')));
    return answer;
  }
  void create(const std::string& topic, const Names& channels) const {
    call("POST", "/topic/create?topic=" + topic);
    for (const auto& channel : channels) call("POST", "/channel/create?topic=" + topic + "&channel=" + channel);
  }

 private:
  static bool complete(const std::string& answer) {
    const size_t end = answer.find("\r\n\r\n");
    if (end == std::string::npos) return false;
    const size_t length = answer.find("Content-Length: ");
    if (length < end) return answer.size() >= end + 4 + std::strtoul(&answer[length + 16], nullptr, 10);
    return answer.compare(answer.size() - 5, 5, "0\r\n\r\n") == 0;  // chunked
  }

  Socket socket_;
};

// ---- Daemons --------------------------------------------------------------------------------------------------------

/// What is measured: a binary with its flags, or (without one) a running daemon.
struct Side {
  std::string binary;
  Names flags;
  bool is_nsqd = false;  // gets the --mem-queue-size that suits each scenario
  sockaddr_in tcp{}, http{};
  pid_t pid = 0;  // 0: not known, so neither memory nor CPU time
};

/// A free port below the ephemeral ones: a connect to one of those could meet itself while the daemon starts.
int free_port() {
  static int next = 20000 + static_cast<int>(getpid() % 10000);
  for (int tries = 0; tries < 10000; ++tries) {
    next = next >= 32000 ? 20000 : next + 1;
    const sockaddr_in address = parse_address("127.0.0.1:" + std::to_string(next));
    if (bind(Socket().fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) return next;
  }
  fail("no free port");
}

/// A running daemon. One that was started here is killed, and its data removed, with the object.
class Daemon {
 public:
  sockaddr_in tcp, http;
  pid_t pid;
  double start_seconds = 0;  // from exec to the first answer over TCP

  Daemon(const Side& side, long mem_queue_size) : tcp(side.tcp), http(side.http), pid(side.pid), binary_(side.binary) {
    if (!own()) return;
    const char* parent = std::getenv("TMPDIR");
    data_ = std::string(parent != nullptr ? parent : "/tmp") + "/nsqd-bench-XXXXXX";
    if (mkdtemp(&data_[0]) == nullptr) fail_errno(data_);
    const std::string tcp_text = "127.0.0.1:" + std::to_string(free_port());
    const std::string http_text = "127.0.0.1:" + std::to_string(free_port());
    tcp = parse_address(tcp_text);
    http = parse_address(http_text);
    flags_ = {"--tcp-address=" + tcp_text, "--http-address=" + http_text, "--data-path=" + data_, "--log-level=fatal"};
    if (side.is_nsqd && mem_queue_size > 0) flags_.push_back("--mem-queue-size=" + std::to_string(mem_queue_size));
    flags_.insert(flags_.end(), side.flags.begin(), side.flags.end());
    try {
      start();
    } catch (...) {
      end();
      throw;
    }
  }
  Daemon(const Daemon&) = delete;
  Daemon& operator=(const Daemon&) = delete;
  ~Daemon() { end(); }

  bool own() const { return !binary_.empty(); }

  /// Starts the binary and waits until it answers.
  void start() {
    std::vector<char*> argv{&binary_[0]};
    for (std::string& flag : flags_) argv.push_back(&flag[0]);
    argv.push_back(nullptr);
    const auto begin = Clock::now();
    pid = fork();
    if (pid < 0) fail_errno("fork");
    if (pid == 0) {
      execv(binary_.c_str(), argv.data());
      std::perror(binary_.c_str());
      _exit(127);
    }
    while (!Socket().connect_to(tcp)) {
      if (exited()) fail(binary_ + " did not start");
      if (seconds_since(begin) > kStall) fail(binary_ + " does not listen");
      sleep_for(100e-6);
    }
    Client(tcp, kSmallInput, "", "").await(1);
    start_seconds = seconds_since(begin);
  }

  /// Seconds from SIGTERM to the exit; a daemon that takes half a minute is killed.
  double stop() {
    const auto begin = Clock::now();
    kill(pid, SIGTERM);
    while (!exited()) {
      if (seconds_since(begin) > 30) kill(pid, SIGKILL);
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
    return seconds_since(begin);
  }

 private:
  bool exited() {
    if (waitpid(pid, nullptr, WNOHANG) != pid) return false;
    pid = 0;
    return true;
  }
  void end() {
    if (!own()) return;
    if (pid > 0) kill(pid, SIGKILL);
    if (pid > 0) waitpid(pid, nullptr, 0);
    const auto remove = [](const char* path, const struct stat*, int, FTW*) { return std::remove(path); };
    nftw(data_.c_str(), remove, 16, FTW_DEPTH | FTW_PHYS);
  }

  std::string binary_, data_;
  Names flags_;
};

/// CPU seconds that a process has used so far, in all its threads; to the nanosecond, unlike /proc/PID/stat.
double cpu_seconds(pid_t pid) {
  clockid_t clock;
  timespec time{};
  if (pid == 0 || clock_getcpuclockid(pid, &clock) != 0 || clock_gettime(clock, &time) != 0) return 0;
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

/// Bytes that a process has in memory: all, or only what no file stands behind. 0 where /proc does not tell.
struct Memory {
  double anonymous = 0, resident = 0;

  explicit Memory(pid_t pid) {
    FILE* file = std::fopen(("/proc/" + std::to_string(pid) + "/status").c_str(), "r");
    if (file == nullptr) return;
    for (char line[256]; std::fgets(line, sizeof line, file) != nullptr;) {
      if (std::strncmp(line, "RssAnon:", 8) == 0) anonymous = std::atof(line + 8) * 1024;
      if (std::strncmp(line, "VmRSS:", 6) == 0) resident = std::atof(line + 6) * 1024;
    }
    std::fclose(file);
  }
};

// ---- Loads ----------------------------------------------------------------------------------------------------------

/// One scenario in one round on one side: the daemon, and where the figures go.
struct Run {
  Daemon& daemon;
  double scale;
  std::function<void(const std::string& figure, double value, const char* unit)> add;
  Names topics;  // made by this run

  uint64_t scaled(double messages) const {  // in whole batches
    return std::max<uint64_t>(1, static_cast<uint64_t>(messages * scale / kBatch)) * kBatch;
  }
  std::string unique_name() {
    topics.push_back("bench_" + std::to_string(getpid()) + "_" + std::to_string(nanoseconds(Clock::now())));
    return topics.back();
  }
  /// A new topic with these channels: all are there before anything is measured.
  std::string topic(const Names& channels) {
    const std::string name = unique_name();
    Http(daemon.http).create(name, channels);
    return name;
  }
  /// For a daemon that goes on running.
  void delete_topics() const {
    const Http http(daemon.http);
    for (const auto& name : topics) http.call("POST", "/topic/delete?topic=" + name);
  }
};

struct Result {
  double per_second, cpu_per_million;
};

std::string publish_command(const std::string& topic, size_t batch) {
  const std::string message = be32_text(kBody) + std::string(kBody, 'x');
  if (batch == 1) return "PUB " + topic + "\n" + message;
  std::string command = "MPUB " + topic + "\n" + be32_text(4 + batch * message.size()) + be32_text(batch);
  for (size_t i = 0; i < batch; ++i) command += message;
  return command;
}
std::string sub_command(const std::string& topic, const std::string& channel) {
  return "SUB " + topic + " " + channel + "\n";
}

void connect_producers(const Run& run, int count, Clients& clients) {
  for (int i = 0; i < count; ++i) {
    clients.push_back(std::make_unique<Client>(run.daemon.tcp, kBigInput, "", ""));
    clients.back()->await(1);
  }
}

/// Publishes up to `messages` for up to `seconds`: commands of `batch` messages, `window` outstanding on each of 4
/// connections.
Result publish(Run& run, const std::string& topic, size_t batch, size_t window, uint64_t messages, double seconds) {
  Clients clients;
  connect_producers(run, 4, clients);
  const uint64_t commands = messages / batch;
  uint64_t budget = commands, answered = 0;
  const double cpu = cpu_seconds(run.daemon.pid);
  const auto start = Clock::now();
  for (const auto& client : clients) client->produce(publish_command(topic, batch), window, &budget);
  drive(clients, [&] {
    answered = 0;
    for (const auto& client : clients) answered += client->responses;
    return answered == commands || seconds_since(start) > seconds;
  });
  const double count = static_cast<double>(answered * batch), elapsed = seconds_since(start);
  return {count / elapsed, (cpu_seconds(run.daemon.pid) - cpu) / count * 1e6};
}

/// Consumes `messages` from each channel, publishing them at the same time if there are producers, else from a backlog.
/// The clock stops at 99 %, as nsqd's output buffer may hold the very last for 250 ms; but all of them must come.
Result flow(Run& run, const std::string& topic, int producers, const Names& channels, int consumers_each,
            uint64_t messages) {
  Clients clients;
  for (const auto& channel : channels)
    for (int i = 0; i < consumers_each; ++i) {
      clients.push_back(std::make_unique<Client>(run.daemon.tcp, kBigInput, "", sub_command(topic, channel)));
      clients.back()->await(2);
    }
  const size_t consumers = clients.size();
  connect_producers(run, producers, clients);

  const uint64_t total = messages * channels.size();
  uint64_t budget = messages / kBatch, received = 0;
  const auto have = [&](uint64_t wanted) {
    received = 0;
    for (size_t i = 0; i < consumers; ++i) received += clients[i]->messages;
    return received >= wanted;
  };
  const double cpu = cpu_seconds(run.daemon.pid);
  const auto start = Clock::now();
  for (size_t i = 0; i < consumers; ++i) clients[i]->say("RDY 2500\n");  // nsqd's --max-rdy-count
  for (size_t i = consumers; i < clients.size(); ++i) clients[i]->produce(publish_command(topic, kBatch), 1, &budget);
  drive(clients, [&] { return have(total - total / 100); });
  const double rate = static_cast<double>(received) / seconds_since(start);
  drive(clients, [&] { return have(total); });
  return {rate, (cpu_seconds(run.daemon.pid) - cpu) / static_cast<double>(total) * 1e6};
}

/// Fills a new topic and waits until its channel "c" holds it all: nsqd acknowledges first and moves messages later.
std::string backlog(Run& run, uint64_t messages, Result* fill = nullptr) {
  const std::string topic = run.topic({"c"});
  const Result result = publish(run, topic, kBatch, 1, messages, 1e9);
  if (fill != nullptr) *fill = result;
  const Http http(run.daemon.http);
  for (const auto start = Clock::now(); seconds_since(start) < kStall; sleep_for(0.01)) {
    const std::string stats = http.call("GET", "/stats?format=json&include_clients=false&topic=" + topic);
    const size_t channel = stats.find("\"channel_name\":\"c\"");
    const size_t depth = channel == std::string::npos ? channel : stats.find("\"depth\":", channel);
    if (depth != std::string::npos && std::strtoull(&stats[depth + 8], nullptr, 10) >= messages) return topic;
  }
  fail("the channel does not get its messages");
}

/// Publishes 5,000 messages per second and consumes them with RDY 100; returns the seconds from when each should have
/// been sent until it was received, sorted. A late send counts, too: nothing is omitted.
std::vector<double> latency(Run& run, const std::string& settings, double seconds) {
  const std::string topic = run.topic({"c"});
  const auto total = static_cast<uint64_t>(5000 * seconds);
  std::vector<double> samples;
  samples.reserve(total);
  Clients consumers;
  consumers.push_back(std::make_unique<Client>(run.daemon.tcp, kBigInput, settings, sub_command(topic, "c")));
  consumers[0]->await(2);
  consumers[0]->latencies = &samples;
  consumers[0]->say("RDY 100\n");

  const auto produce = [&] {
#ifdef __linux__
    prctl(PR_SET_TIMERSLACK, 1UL);  // else a sleep may take 50 us too long
#endif
    Clients producers;
    connect_producers(run, 1, producers);
    std::string command = publish_command(topic, 1);
    auto due = Clock::now();
    for (uint64_t i = 0; i < total && !interrupted; ++i) {
      due += std::chrono::microseconds(200);
      const int64_t stamp = nanoseconds(due);
      std::memcpy(&command[command.size() - kBody], &stamp, sizeof stamp);
      std::this_thread::sleep_until(due);
      producers[0]->say(command);
      producers[0]->serve();
    }
    drive(producers, [&] { return producers[0]->responses == total; });
  };
  auto producer = std::async(std::launch::async, produce);
  drive(consumers, [&] { return samples.size() == total; });
  producer.get();
  std::sort(samples.begin(), samples.end());
  return samples;
}

double microseconds_at(const std::vector<double>& sorted, double quantile) {
  return sorted[static_cast<size_t>(quantile * static_cast<double>(sorted.size()))] * 1e6;
}

constexpr char kUnbuffered[] = ",\"output_buffer_size\":-1";
constexpr size_t kIdleWindow = 4;  // seconds over which idle CPU is measured

/// Consumers that get nothing, on a topic of their own; a thread answers their heartbeats.
/// Heartbeats come every 30 s by default, so a short window after the connects would see none. Therefore 12 of 30 clients
/// ask for their first one within 12 seconds around the window that begins `settling` seconds from now, evenly spread: as
/// many as there are on average. Around it, since a daemon may send together what is due within a few seconds.
class IdleConsumers {
 public:
  IdleConsumers(Run& run, size_t count, size_t settling) {
    const std::string sub = sub_command(run.topic({"c"}), "c") + "RDY 1\n";
    const size_t around = 3 * kIdleWindow, early = count * around / 30;
    for (size_t i = 0, waiting = 0; i < count; ++i) {
      const size_t interval = i < early ? (settling - kIdleWindow) * 1000 + around * 1000 * i / early : 30000;
      const std::string settings = ",\"heartbeat_interval\":" + std::to_string(interval);
      clients_.push_back(std::make_unique<Client>(run.daemon.tcp, kSmallInput, settings, sub));
      if (i + 1 - waiting == 200 || i + 1 == count)  // many at once: a turn of a poll loop costs with each connection
        for (; waiting <= i; ++waiting) clients_[waiting]->await(2);
    }
    answering_ = std::async(std::launch::async, [this] { answer(); });
  }
  ~IdleConsumers() { stop_ = true; }

  /// Ends the answering. Throws if any of them was lost meanwhile.
  void finish() {
    stop_ = true;
    answering_.get();
  }

 private:
  void answer() {
    for (std::vector<pollfd> fds = pollfds(clients_); !stop_; sleep_for(0.2)) {
      poll(fds.data(), static_cast<nfds_t>(fds.size()), 0);
      for (size_t i = 0; i < fds.size(); ++i)
        if (fds[i].revents != 0) clients_[i]->serve();
    }
  }

  Clients clients_;
  std::atomic<bool> stop_{false};
  std::future<void> answering_;  // its destructor waits
};

/// CPU time in percent of one core.
double idle_cpu(const Run& run, double settling) {
  sleep_for(settling);
  const double before = cpu_seconds(run.daemon.pid);
  const auto start = Clock::now();
  sleep_for(kIdleWindow);
  return (cpu_seconds(run.daemon.pid) - before) / seconds_since(start) * 100;
}

// ---- Scenarios ------------------------------------------------------------------------------------------------------

void add_rate(Run& run, const char* figure, const Result& result) { run.add(figure, result.per_second, "msg/s"); }
void add_cpu(Run& run, const Result& result) {
  if (run.daemon.pid != 0) run.add("daemon's CPU per million", result.cpu_per_million, "s");
}
void add_memory(Run& run, const std::string& what, const Memory& before, double count) {
  if (run.daemon.pid == 0) return;
  const Memory now(run.daemon.pid);
  run.add(what + ", anonymous memory each", (now.anonymous - before.anonymous) / count, "B");
  run.add(what + ", resident memory each", (now.resident - before.resident) / count, "B");
}

void publish_batches(Run& run) {
  const Result result = publish(run, run.topic({}), kBatch, 1, run.scaled(4e6), run.scale);
  add_rate(run, "MPUB of 200, 4 connections", result);
  add_cpu(run, result);
}

void publish_window(Run& run) {
  add_rate(run, "PUB, 4 connections, 100 outstanding",
           publish(run, run.topic({}), 1, 100, run.scaled(4e6), run.scale));
}

void publish_strict(Run& run) {
  add_rate(run, "PUB, 4 connections, request and response",
           publish(run, run.topic({}), 1, 1, run.scaled(4e6), run.scale));
}

void consume(Run& run) {
  const uint64_t messages = run.scaled(1e6);
  const Result result = flow(run, backlog(run, messages), 0, {"c"}, 4, messages);
  add_rate(run, "backlog of 1 M, 4 consumers, RDY 2500", result);
  add_cpu(run, result);
}

void publish_and_consume(Run& run) {
  add_rate(run, "MPUB of 200 and consume, 2 and 2 connections",
           flow(run, run.topic({"c"}), 2, {"c"}, 2, run.scaled(2e6)));
}

void fan_out(Run& run) {
  Names channels;
  const auto measure = [&](size_t count, double messages, const char* figure) {
    while (channels.size() < count) channels.push_back("c" + std::to_string(channels.size()));
    add_rate(run, figure, flow(run, run.topic(channels), 2, channels, 1, run.scaled(messages)));
  };
  measure(1, 1e6, "to 1 channel, deliveries");
  measure(4, 5e5, "to 4 channels, deliveries");
  measure(16, 2e5, "to 16 channels, deliveries");
}

void latencies(Run& run) {
  const auto measure = [&](const std::string& label, const std::string& settings) {
    const auto samples = latency(run, settings, 2 * run.scale);
    run.add("5,000 msg/s, " + label + ", p50", microseconds_at(samples, 0.5), "us");
    run.add("5,000 msg/s, " + label + ", p99", microseconds_at(samples, 0.99), "us");
    run.add("5,000 msg/s, " + label + ", p99.9", microseconds_at(samples, 0.999), "us");
  };
  measure("default settings", "");
  measure("no output buffer", kUnbuffered);
}

void idle_1000(Run& run) {
  run.topic({"c"});
  const Memory before(run.daemon.pid);
  const size_t settling = 20;  // intervals of 16 s and more, which a daemon may treat as those of 30 s
  IdleConsumers idle(run, 1000, settling);
  const double cpu = idle_cpu(run, settling);
  add_memory(run, "1,000 consumers", before, 1000);
  if (run.daemon.pid != 0) run.add("1,000 consumers, CPU", cpu, "%");
  idle.finish();
}

void idle_10000(Run& run) {
  rlimit files{};
  getrlimit(RLIMIT_NOFILE, &files);
  if (files.rlim_cur < 10200) fail("needs 10,200 file descriptors: see ulimit -n");
  const auto pair_rate = [&] { return flow(run, run.topic({"c"}), 1, {"c"}, 1, run.scaled(1e6)); };
  const auto pair_latency = [&] { return microseconds_at(latency(run, kUnbuffered, run.scale), 0.5); };
  const Result alone = pair_rate();
  add_rate(run, "a working pair alone", alone);
  run.add("5,000 msg/s alone, p50", pair_latency(), "us");
  IdleConsumers idle(run, 10000, 5);
  const Result beside = pair_rate();
  add_rate(run, "the pair beside 10,000 idle consumers", beside);
  run.add("the pair's rate, beside over alone", beside.per_second / alone.per_second, "x");
  run.add("5,000 msg/s beside the idle, p50", pair_latency(), "us");
  idle.finish();
}

void backlog_of_a_million(Run& run) {
  const uint64_t messages = run.scaled(1e6);
  run.topic({"c"});
  const Memory before(run.daemon.pid);
  Result fill{};
  const std::string topic = backlog(run, messages, &fill);
  add_memory(run, "1 M messages", before, static_cast<double>(messages));
  add_rate(run, "fill, MPUB of 200, 4 connections", fill);
  add_rate(run, "drain, 4 consumers", flow(run, topic, 0, {"c"}, 4, messages));
}

void thousand_topics(Run& run) {
  run.topic({"c"});
  const Memory before(run.daemon.pid);
  const Http http(run.daemon.http);
  const auto start = Clock::now();
  for (int i = 0; i < 1000; ++i) http.create(run.unique_name(), {"c"});
  run.add("creates over HTTP, topics and channels", 2000 / seconds_since(start), "/s");
  if (run.daemon.pid != 0) run.add("1,000 topics with a channel, CPU", idle_cpu(run, 1), "%");
  add_memory(run, "1,000 topics", before, 1000);
}

void start_and_stop(Run& run) {
  if (!run.daemon.own()) return;
  run.add("start: exec to an answer over TCP", run.daemon.start_seconds * 1e3, "ms");
  backlog(run, run.scaled(1e6));
  run.add("SIGTERM to exit, backlog of 1 M", run.daemon.stop() * 1e3, "ms");
  run.daemon.start();
  run.add("start with a backlog of 1 M", run.daemon.start_seconds * 1e3, "ms");
}

struct Scenario {
  const char* word;
  long nsqd_queue;  // --mem-queue-size for an nsqd, which reserves that much in each topic and channel; 0: its default
  void (*run)(Run&);
};
constexpr Scenario kScenarios[] = {
    {"publish-batch", 100000000, publish_batches}, {"publish-window", 100000000, publish_window},
    {"publish-strict", 100000000, publish_strict}, {"consume", 100000000, consume},
    {"both", 100000000, publish_and_consume},      {"fan-out", 10000000, fan_out},
    {"latency", 100000000, latencies},             {"idle-1000", 0, idle_1000},
    {"idle-10000", 10000000, idle_10000},          {"backlog", 10000000, backlog_of_a_million},
    {"topics", 0, thousand_topics},                {"start", 10000000, start_and_stop},
};

// ---- Report ---------------------------------------------------------------------------------------------------------

struct Figure {
  std::string scenario, name, unit;
  std::vector<double> values[2];  // by side, one for each round

  double median(size_t side) const {
    std::vector<double> sorted = values[side];
    if (sorted.empty()) return 0;
    std::sort(sorted.begin(), sorted.end());
    return (sorted[(sorted.size() - 1) / 2] + sorted[sorted.size() / 2]) / 2;
  }
  double ratio() const { return median(1) > 0 ? median(0) / median(1) : 0; }
};

/// Three significant digits: 5.91 M, 870 k, 125, 0.0291.
std::string rounded(double value) {
  const char* prefix = value >= 999500 ? " M" : value >= 9995 ? " k" : "";
  value /= value >= 999500 ? 1e6 : value >= 9995 ? 1e3 : 1;
  char text[64];
  std::snprintf(text, sizeof text, value >= 99.95 ? "%.0f%s" : "%.3g%s", value, prefix);
  return text;
}

void print_table(const std::vector<Figure>& figures, bool two_sides) {
  std::printf("%-15s %-45s %-5s %9s", "scenario", "figure", "unit", two_sides ? "this" : "median");
  std::printf(two_sides ? " %9s  %s\n" : "\n", "other", "this/other");
  for (const Figure& f : figures) {
    std::printf("%-15s %-45s %-5s %9s", f.scenario.c_str(), f.name.c_str(), f.unit.c_str(),
                rounded(f.median(0)).c_str());
    if (two_sides) std::printf(" %9s %9.3g", rounded(f.median(1)).c_str(), f.ratio());
    std::printf("\n");
  }
}

void print_json(const Figure& f, bool two_sides) {
  const auto list = [](const std::vector<double>& values) {
    std::string text;
    for (const double value : values) text += (text.empty() ? "" : ",") + std::to_string(value);
    return "[" + text + "]";
  };
  std::printf("{\"scenario\":\"%s\",\"figure\":\"%s\",\"unit\":\"%s\",\"value\":%f,\"rounds\":%s", f.scenario.c_str(),
              f.name.c_str(), f.unit.c_str(), f.median(0), list(f.values[0]).c_str());
  if (two_sides)
    std::printf(",\"other\":%f,\"other_rounds\":%s,\"ratio\":%f", f.median(1), list(f.values[1]).c_str(), f.ratio());
  std::printf("}\n");
}

void progress(const std::string& text) {  // on a terminal one line, written over and over
  const bool terminal = isatty(2) == 1;
  std::fprintf(stderr, "%s%s%s", terminal ? "\r\033[K" : "", text.c_str(), terminal || text.empty() ? "" : "\n");
}

// ---- Command line ---------------------------------------------------------------------------------------------------

constexpr char kUsage[] =
    "bench [options] [-- flags of the daemon]\n"
    "  --bin PATH               the daemon to start (default: ./nsqd)\n"
    "  --nsqd                   it is nsqd: choose its --mem-queue-size for each scenario\n"
    "  --tcp ADDR --http ADDR   use this running daemon instead; --pid PID: for its memory and CPU time\n"
    "  --versus PATH \"FLAGS\"    compare with another binary, alternating; --versus-nsqd PATH: with an nsqd\n"
    "  --only WORD              only scenarios whose name contains it\n"
    "  --rounds N               medians of N rounds (default 3)\n"
    "  --scale X                X times as many messages or seconds\n"
    "  --json                   a line of JSON for each figure instead of the table\n";

struct Settings {
  Side sides[2];
  size_t side_count = 1;
  std::string only;
  int rounds = 3;
  double scale = 1;
  bool json = false, help = false;
};

Names words(const std::string& text) {
  Names list;
  for (size_t at = 0, end; (at = text.find_first_not_of(' ', at)) != std::string::npos; at = end)
    list.push_back(text.substr(at, (end = std::min(text.find(' ', at), text.size())) - at));
  return list;
}

Settings parse(int argc, char** argv) {
  Settings settings;
  Side &mine = settings.sides[0], &other = settings.sides[1];
  std::string tcp, http;
  int i = 1;
  const auto value = [&] {
    if (i + 1 >= argc) fail("a value is missing after " + std::string(argv[i]));
    return std::string(argv[++i]);
  };
  for (; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--help") settings.help = true;
    else if (option == "--json") settings.json = true;
    else if (option == "--nsqd") mine.is_nsqd = true;
    else if (option == "--bin") mine.binary = value();
    else if (option == "--tcp") tcp = value();
    else if (option == "--http") http = value();
    else if (option == "--pid") mine.pid = std::atoi(value().c_str());
    else if (option == "--only") settings.only = value();
    else if (option == "--rounds") settings.rounds = std::max(1, std::atoi(value().c_str()));
    else if (option == "--scale") settings.scale = std::max(0.001, std::atof(value().c_str()));
    else if (option == "--versus") other.binary = value(), other.flags = words(value());
    else if (option == "--versus-nsqd") other.binary = value(), other.is_nsqd = true;
    else if (option == "--") mine.flags.assign(argv + i + 1, argv + argc), i = argc;
    else fail("unknown option " + option + "; see bench --help");
  }
  if (!other.binary.empty()) settings.side_count = 2;
  if (tcp.empty() != http.empty()) fail("--tcp and --http go together");
  if (!tcp.empty()) mine.tcp = parse_address(tcp), mine.http = parse_address(http), mine.binary.clear();
  else if (mine.binary.empty()) mine.binary = "./nsqd";
  for (const Side& side : settings.sides)
    if (!side.binary.empty() && access(side.binary.c_str(), X_OK) != 0) fail_errno(side.binary);
  return settings;
}

/// One round of one scenario on one side; its figures are added to `figures`.
void run_once(const Scenario& scenario, const Settings& settings, size_t side, std::vector<Figure>& figures) {
  Daemon daemon(settings.sides[side], scenario.nsqd_queue);
  Run run{daemon, settings.scale, nullptr, {}};
  run.add = [&](const std::string& name, double value, const char* unit) {
    auto figure = std::find_if(figures.begin(), figures.end(),
                               [&](const Figure& f) { return f.scenario == scenario.word && f.name == name; });
    if (figure == figures.end()) figure = figures.insert(figures.end(), Figure{scenario.word, name, unit, {}});
    figure->values[side].push_back(value);
  };
  scenario.run(run);
  if (!daemon.own()) run.delete_topics();
}

/// Runs the scenarios, the sides of each in turn. Returns how many failed, which is told and does not stop the others.
int run_all(const Settings& settings) {
  std::vector<Figure> figures;
  int failures = 0;
  for (const Scenario& scenario : kScenarios) {
    if (interrupted || std::strstr(scenario.word, settings.only.c_str()) == nullptr) continue;
    try {
      for (int round = 1; round <= settings.rounds; ++round)
        for (size_t side = 0; side < settings.side_count; ++side) {
          const char* name = settings.side_count == 1 ? "" : side == 0 ? ", this" : ", other";
          progress(std::string(scenario.word) + ", round " + std::to_string(round) + " of " +
                   std::to_string(settings.rounds) + name);
          run_once(scenario, settings, side, figures);
        }
    } catch (const std::exception& error) {
      progress("");
      std::fprintf(stderr, "%s: %s\n", scenario.word, error.what());
      ++failures;
    }
  }
  progress("");
  if (!settings.json) print_table(figures, settings.side_count == 2);
  for (const Figure& figure : figures)
    if (settings.json) print_json(figure, settings.side_count == 2);
  return failures;
}

}  // namespace bench
}  // namespace

/// argv[0] is the word "bench" (or the program); the options follow. Returns the exit status.
int bench_main(int argc, char** argv) {
  try {
    const bench::Settings settings = bench::parse(argc, argv);
    if (settings.help) return std::fputs(bench::kUsage, stdout) < 0;
    for (const int number : {SIGINT, SIGTERM}) std::signal(number, [](int) { bench::interrupted = 1; });
    rlimit files{};
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;  // for the daemons, too: they inherit it
    setrlimit(RLIMIT_NOFILE, &files);
    return bench::run_all(settings) == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench: %s\n", error.what());
    return 2;
  }
}

// =====================================================================================================================
// main
// =====================================================================================================================

#ifdef NSQD_FUZZ
// The engine's main. $FUZZ is the target; without one, it prints the targets with their longest input, and writes their
// seeds to the folder that is given.
extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  if (std::getenv("FUZZ") != nullptr) return 0;
  for (const fuzz::Target& target : fuzz::kTargets) {
    std::printf("%s %d\n", target.name, target.longest);
    g_folder = (*argv)[*argc - 1];
    size_t number = 0;
    for (const auto& seed : target.seeds()) write_file(folder(target.name) + "/seed-" + std::to_string(number++), seed);
  }
  std::exit(0);
}
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto* const target = std::find_if(fuzz::kTargets.begin(), fuzz::kTargets.end(), [](const fuzz::Target& t) {
    return std::getenv("FUZZ") != nullptr && std::strcmp(t.name, std::getenv("FUZZ")) == 0;
  });
  if (target == fuzz::kTargets.end()) return std::fprintf(stderr, "FUZZ names no target\n"), std::exit(2), 0;
  target->run({reinterpret_cast<const char*>(data), size});
  return 0;
}
#else
int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  if (argc > 1 && std::strcmp(argv[1], "bench") == 0) return bench_main(argc - 1, argv + 1);
  const char* program = std::getenv("NSQD_BIN");
  g_program = std::filesystem::absolute(program != nullptr ? program : "nsqd").string();
  g_self = argv[0];
  if (access(g_program.c_str(), X_OK) != 0)
    return std::fprintf(stderr, "no program at %s: build it, or set NSQD_BIN\n", g_program.c_str()), 2;
  std::vector<const Test*> chosen;
  for (const Test& test : tests()) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; i++) wanted = wanted || std::strstr(test.name, argv[i]) != nullptr;
    if (wanted) chosen.push_back(&test);
  }
  if (chosen.empty()) return std::fprintf(stderr, "no test has such a name\n"), 2;
  return run_all(chosen);
}
#endif
