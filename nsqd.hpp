// SPDX-License-Identifier: MIT
// Copyright (c) 2026 the nsqd.hpp maintainers. The licence is at the end of this file.
//
// nsqd.hpp: an NSQ message queue daemon in one C++17 header, for the C++ standard library and POSIX alone.
//
// A producer publishes messages to a topic. Each channel of the topic gets every message; among the consumers of a channel,
// each message goes to one. A consumer says how many messages it takes at once (RDY) and finishes each (FIN), or it comes
// again. To embed the daemon, read section [1]; main.cpp shows the program. To learn how it works, read on in this order:
// [6] and [7] are the idea, [9] is how clients speak to it, [14] and [15] are the machine that moves the bytes.
//
// Map (search for the number in brackets):
//
// [1] Interface                    [7] Topics and channels           [13] Peers
// [2] Ground                       [8] Recovery                      [14] The poll loop
// [3] Logger                       [9] Protocol V2                   [15] The daemon
// [4] JSON                         [10] Statistics                   [16] Options from flags and file
// [5] Data path                    [11] The page                     [17] Run
// [6] The log                      [12] HTTP                         [18] Licence
//
// The life of a message:
//
//   PUB --> V2Session::step --> Topic::publish --> Log::append -----------> a segment file, mapped
//                                                      | message number n            |
//                                                      v                             |
//                                 for each channel that is hungry: Channel::pump     | sent from where it lies
//                                                      |                             |
//                                                      v                             v
//   RDY --> Channel::set_ready ----> Channel::deliver: 1. requeued, its turn   2. the one at the cursor
//                                                      |
//                                                      v
//            a slot of the Ledger, and Held: in flight, with consumer and deadline, found by id --> Port --> Loop::write
//                 |                  |                       |                       |
//                FIN       REQ 0, Channel::on_time         REQ t                   TOUCH
//             the slot       Channel::put_back         Channel::put_off       Channel::wait, later
//             is free
//                 |
//                 v
//        Topic::release_if_done: a segment that every channel has finished goes
//
// Words: a topic's *log* holds its messages, in *segments*; each message has a *number* there. A channel's *cursor* is the
// number of the first message that it never delivered; its *ledger* is the file with the cursor and a *slot* for each message
// before it that is not finished. A message is *waiting*, *in flight*, *requeued* (ready again), *deferred* (due at a time) or
// *finished*. Messages below a topic's *distributed* mark were handed to its channels. A segment is *sealed* when it gets no
// more messages. A *session* is one side of a connection, a *turn* one round of the loop.
//
// One thread owns everything: sockets, topics, timers. There is no lock on a message's way. A turn reads each ready socket
// once, carries out what has arrived, delivers, makes durable what has changed, and only then writes: so nothing is
// acknowledged before it is stored, and a thousand commands share one system call.
//
// Left out: TLS, snappy, deflate (they need packages), and replication (NSQ has none).

#ifndef NSQD_HPP
#define NSQD_HPP

#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <regex.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>
#include <functional>
#include <future>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

// ---------------------------------------------------------------------------------------------------------------------
// [1] Interface
//
// All that a program which embeds the daemon needs. Nothing below this section has to be read to use it.
// Always: every member function of Daemon and Subscription may be called from any thread, but not from two threads while
// the object is being destroyed.
// ---------------------------------------------------------------------------------------------------------------------

#define NSQD_VERSION_MAJOR 1
#define NSQD_VERSION_MINOR 0
#define NSQD_VERSION_PATCH 0

namespace nsqd {

inline constexpr std::string_view kVersion = "1.0.0";          // of this header
inline constexpr std::string_view kProtocolVersion = "1.3.0";  // the nsqd that this daemon answers as

using Duration = std::chrono::nanoseconds;

enum class Level { kDebug = 1, kInfo, kWarning, kError, kFatal };  // the numbers are those of GET /config/log_level

/// The settings of a daemon. Each is named as its flag with underscores; the defaults are those of nsqd 1.3.0.
/// `nsqd --help` explains each of them, and section [16] holds the table of flags.
struct Options {
  // Where it listens: host:port, or the path of a Unix socket. Port 0 takes any free port (see Daemon::tcp_port).
  std::string tcp_address = "0.0.0.0:4150";
  std::string http_address = "0.0.0.0:4151";   // empty: no HTTP
  std::string https_address = "0.0.0.0:4152";  // accepted and shown; there is no TLS here, so never listened on
  std::string broadcast_address;               // empty: the host's name
  int64_t broadcast_tcp_port = 0;              // 0: the port listened on
  int64_t broadcast_http_port = 0;

  // Where it stores, and how safely.
  std::string data_path;                // empty: the current directory; it must exist
  bool mem_only = false;                // no data path, no lock, no files: everything ends with the process
  int64_t mem_queue_size = 10000;       // messages; bounds what is kept in memory only: ephemerals, and all with mem_only
  int64_t max_bytes_per_file = 104857600;
  int64_t sync_every = 2500;            // publishes and finishes per fsync; 1: a publish is answered after its fsync
  Duration sync_timeout = std::chrono::seconds(2);  // fsync at least this often when something changed; 0: never by time

  // Limits for clients.
  Duration msg_timeout = std::chrono::minutes(1);
  Duration max_msg_timeout = std::chrono::minutes(15);
  int64_t max_msg_size = 1048576;   // bytes
  int64_t max_body_size = 5242880;  // bytes
  Duration max_req_timeout = std::chrono::hours(1);
  Duration max_heartbeat_interval = std::chrono::minutes(1);
  int64_t max_rdy_count = 2500;
  int64_t max_output_buffer_size = 65536;
  Duration max_output_buffer_timeout = std::chrono::seconds(30);
  Duration min_output_buffer_timeout = std::chrono::milliseconds(25);
  Duration output_buffer_timeout = std::chrono::milliseconds(250);
  int64_t max_channel_consumers = 0;  // 0: no limit

  // The cluster.
  static constexpr int64_t kFromHostName = std::numeric_limits<int64_t>::min();
  int64_t node_id = kFromHostName;  // 0 to 1023, part of every message id; the default is a hash of the host's name
  std::vector<std::string> lookupd_tcp_address;
  std::vector<std::string> auth_http_address;
  std::string auth_http_request_method = "get";
  Duration http_client_connect_timeout = std::chrono::seconds(2);
  Duration http_client_request_timeout = std::chrono::seconds(5);
  std::string topology_region;
  std::string topology_zone;
  std::vector<std::string> enable_experiment;

  // What it tells about itself.
  Level log_level = Level::kInfo;
  std::string log_prefix = "[nsqd] ";
  std::function<void(std::string_view line)> log;  // takes each line, without its newline; empty: standard error
  std::string statsd_address;
  std::string statsd_prefix = "nsq.%s";
  Duration statsd_interval = std::chrono::minutes(1);
  bool statsd_mem_stats = true;
  int64_t statsd_udp_packet_size = 508;
  bool statsd_exclude_ephemeral = false;
  std::vector<double> e2e_processing_latency_percentile;
  Duration e2e_processing_latency_window_time = std::chrono::minutes(10);

  // Accepted for nsqd's sake. TLS settings stop the start; the others change nothing but what is shown.
  std::string tls_cert, tls_key, tls_root_ca_file, tls_client_auth_policy;
  int64_t tls_required = 0;       // 0 no, 1 tcp-https, 2 yes
  int64_t tls_min_version = 769;  // TLS 1.0, as its number on the wire
  bool deflate = true;
  bool snappy = true;
  int64_t max_deflate_level = 6;
  int64_t queue_scan_worker_pool_max = 4;
  int64_t queue_scan_selection_count = 20;
};

/// Ends a start early: what() is for the user. Thrown for a wrong flag (status 2), for --help and --version (status 0).
struct EarlyExit : std::runtime_error {
  EarlyExit(int exit_status, const std::string& text, bool on_stdout = false)
      : std::runtime_error(text), status(exit_status), to_stdout(on_stdout) {}
  int status;
  bool to_stdout;
};

/// The options that a command line asks for: flag over config file over default. Throws EarlyExit for flags that are
/// wrong or that only ask for a text, std::runtime_error for a config file that is wrong. Says on standard error which words
/// of either are not read.
Options options_from(int argc, const char* const* argv);

/// A message as a consumer in this process gets it.
struct Message {
  std::string id;         // 16 characters, as on the wire
  std::string body;
  int64_t timestamp = 0;  // of its publication, nanoseconds since 1970
  uint16_t attempts = 0;  // 1 at the first delivery
};

/// A snapshot of what GET /stats tells. All counters start at 0 with the process; depths count what is stored.
struct ClientStats {
  std::string client_id, hostname, user_agent, remote_address, auth_identity, auth_identity_url;
  std::string topology_region, topology_zone;
  int state = 0;               // 0 init, 3 subscribed, 4 closing
  int64_t ready_count = 0, in_flight_count = 0, message_count = 0, finish_count = 0, requeue_count = 0;
  int64_t connected_at = 0;    // Unix seconds
  int64_t connected_for = 0;   // nanoseconds
  int sample_rate = 0;
  bool authed = false;
  std::vector<std::pair<std::string, uint64_t>> pub_counts;  // topic, messages published
};

struct LatencyStats {
  uint64_t count = 0;                                  // samples in the window
  std::vector<std::pair<double, int64_t>> percentiles; // quantile, nanoseconds
};

struct ChannelStats {
  std::string name;
  int64_t depth = 0, backend_depth = 0, in_flight_count = 0, deferred_count = 0;
  uint64_t message_count = 0, requeue_count = 0, timeout_count = 0;
  uint64_t zone_local_count = 0, region_local_count = 0, global_count = 0;
  int64_t client_count = 0;
  std::vector<ClientStats> clients;  // empty where they were not asked for
  bool paused = false;
  LatencyStats latency;
};

struct TopicStats {
  std::string name;
  int64_t depth = 0, backend_depth = 0;
  uint64_t message_count = 0, message_bytes = 0;
  bool paused = false;
  std::vector<ChannelStats> channels;  // sorted by name
  LatencyStats latency;
};

struct Stats {
  std::string health;              // "OK", or "NOK - " and why
  int64_t start_time = 0;          // Unix seconds
  std::vector<TopicStats> topics;  // sorted by name
  std::vector<ClientStats> producers;
};

namespace detail {
class Engine;
struct LocalConsumer;
}  // namespace detail

/// A consumer inside this process, one of the channel's consumers like any that came over a socket. Its messages must be
/// finished, requeued or touched within Options::msg_timeout. Destroying it gives back at once what it had in flight.
class Subscription {
 public:
  Subscription(Subscription&&) noexcept;
  Subscription& operator=(Subscription&&) noexcept;
  ~Subscription();
  /// The next message; nothing when none came within `timeout`, or when the daemon stopped or the channel was deleted.
  std::optional<Message> next(Duration timeout);
  /// Each returns whether the message was in flight with this subscription (false after its time-out).
  bool finish(const Message& message);
  bool requeue(const Message& message, Duration delay = Duration::zero());
  bool touch(const Message& message);

 private:
  friend class Daemon;
  explicit Subscription(std::shared_ptr<detail::LocalConsumer> consumer) : consumer_(std::move(consumer)) {}
  std::shared_ptr<detail::LocalConsumer> consumer_;
};

/// The daemon. Its constructor takes the lock of the data path, binds the listeners and loads what is stored; it throws
/// std::runtime_error with a text that says what to do. The destructor stops it.
class Daemon {
 public:
  explicit Daemon(Options options);
  ~Daemon();
  Daemon(const Daemon&) = delete;
  Daemon& operator=(const Daemon&) = delete;

  /// Begins to serve, on a thread of its own, and returns at once.
  void start();
  /// Closes the listeners, the clients and the topics, in this order, and unlocks the data path. Nothing that was
  /// accepted is lost. A second call does nothing.
  void stop();

  int tcp_port() const;   // -1 on a Unix socket
  int http_port() const;  // -1 on a Unix socket, 0 without HTTP

  /// Store messages as PUB, MPUB and DPUB do, and return when they are as safe as the daemon's options make them. Throw
  /// std::invalid_argument for a bad name, size or delay, std::runtime_error when it cannot store or does not run: start()
  /// comes first.
  void publish(std::string_view topic, std::string_view body);
  void publish(std::string_view topic, const std::vector<std::string>& bodies);
  void publish_deferred(std::string_view topic, std::string_view body, Duration delay);

  /// Consume in this process, with at most `max_in_flight` messages unfinished. Throws as publish does.
  Subscription subscribe(std::string_view topic, std::string_view channel, int max_in_flight = 1);

  /// Administration, as its HTTP calls do it. create throws std::invalid_argument for a bad name; the others return
  /// whether the topic or channel was there.
  void create_topic(std::string_view topic);
  void create_channel(std::string_view topic, std::string_view channel);
  bool delete_topic(std::string_view topic);
  bool delete_channel(std::string_view topic, std::string_view channel);
  bool empty_topic(std::string_view topic);
  bool empty_channel(std::string_view topic, std::string_view channel);
  bool pause_topic(std::string_view topic, bool paused = true);
  bool pause_channel(std::string_view topic, std::string_view channel, bool paused = true);
  Stats stats() const;

 private:
  std::unique_ptr<detail::Engine> engine_;
};

/// What a service gets from run().
struct Environment {
  int argc = 0;
  const char* const* argv = nullptr;
  std::function<void()> end;  // ends run() as a signal would; may be called from any thread, and more than once
};

/// A program that starts, runs until a signal, and stops. init and start throw what stops the program at once.
class Service {
 public:
  virtual ~Service() = default;
  virtual void init(const Environment& environment) = 0;
  virtual void start() = 0;  // must not block
  virtual int stop() = 0;    // returns the exit status
};

/// init, start, wait for a signal, stop: returns what stop returned, or, after a message on standard error, a status that
/// is not 0 when init or start threw. The signals are blocked from the first step on and stay blocked afterwards: one that
/// comes during the start is not lost, and a second one changes nothing. The only function here that touches signals.
int run(Service& service, int argc, const char* const* argv, std::initializer_list<int> signals = {SIGINT, SIGTERM});

}  // namespace nsqd

// ---------------------------------------------------------------------------------------------------------------------
// [2] Ground
//
// Tools of a few lines each: results, descriptors, byte order, words and numbers, timers, message ids, checksums.
// ---------------------------------------------------------------------------------------------------------------------

namespace nsqd::detail {

inline constexpr int64_t kMicrosecond = 1000, kMillisecond = 1000 * kMicrosecond, kSecond = 1000 * kMillisecond;
inline constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

/// What can fail on the loop returns a Status; only the start throws.
struct [[nodiscard]] Status {
  std::string error;  // empty: it worked
  bool ok() const { return error.empty(); }
};

inline void add_to(std::string& joined, std::string_view part) { joined += part; }
template <typename Number, typename = std::enable_if_t<std::is_arithmetic_v<Number>>>
void add_to(std::string& joined, Number part) { joined += std::to_string(part); }

/// The parts one after the other: texts as they are, numbers in decimal.
template <typename... Parts>
std::string text(const Parts&... parts) {
  std::string joined;
  (add_to(joined, parts), ...);
  return joined;
}

/// The one place where errno becomes a text.
inline Status system_error(std::string_view action, std::string_view path, int code = errno) {
  return {text(action, " ", path, ": ", std::strerror(code))};
}
inline void throw_unless(const Status& status) { if (!status.ok()) throw std::runtime_error(status.error); }

/// a + b, or the largest value where that would overflow. For times that a client may choose.
inline int64_t saturating_add(int64_t a, int64_t b) {
  int64_t sum = 0;
  return __builtin_add_overflow(a, b, &sum) ? kNever : sum;
}

/// Owns a file descriptor.
class Fd {
 public:
  explicit Fd(int fd = -1) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept { return std::swap(fd_, other.fd_), *this; }
  ~Fd() { if (fd_ >= 0) ::close(fd_); }
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_;
};

// Numbers in memory: host byte order for our own files, big endian for the wire. memcpy knows no alignment and no aliasing
// rules, and compiles to one instruction.
template <typename Number>
Number load(const char* from) {
  Number number;
  std::memcpy(&number, from, sizeof number);
  return number;
}
template <typename Number>
void store(char* to, Number number) { std::memcpy(to, &number, sizeof number); }
template <typename Number>
Number big_endian(Number number) {  // GCC 12 at -O2 does not make one instruction of a loop over the bytes
  if constexpr (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__) return number;
  else if constexpr (sizeof number == 2) return static_cast<Number>(__builtin_bswap16(static_cast<uint16_t>(number)));
  else if constexpr (sizeof number == 4) return static_cast<Number>(__builtin_bswap32(static_cast<uint32_t>(number)));
  else return static_cast<Number>(__builtin_bswap64(static_cast<uint64_t>(number)));
}
template <typename Number>
Number get_be(const char* from) { return big_endian(load<Number>(from)); }
template <typename Number>
void put_be(char* to, Number number) { store(to, big_endian(number)); }

inline constexpr std::string_view kDigits = "0123456789", kHexDigits = "0123456789abcdef", kEphemeral = "#ephemeral";

inline bool ends_with(std::string_view whole, std::string_view end) {
  return whole.size() >= end.size() && whole.substr(whole.size() - end.size()) == end;
}
inline char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }
inline std::string lower(std::string_view word) {
  std::string lowered(word);
  for (char& c : lowered) c = lower(c);
  return lowered;
}
inline bool same_word(std::string_view a, std::string_view b) { return a.size() == b.size() && lower(a) == lower(b); }
inline std::string_view trimmed(std::string_view word) {
  const size_t first = word.find_first_not_of(" \t\r");
  return first == word.npos ? std::string_view() : word.substr(first, word.find_last_not_of(" \t\r") - first + 1);
}

/// Topic and channel names: 1 to 64 of . _ - and ASCII letters and digits, the suffix #ephemeral counted but not alone.
inline bool is_ephemeral(std::string_view name) { return ends_with(name, kEphemeral); }
inline bool valid_name(std::string_view name) {
  if (name.size() > 64) return false;
  if (is_ephemeral(name)) name.remove_suffix(kEphemeral.size());
  for (char c : name)
    if (!(c >= 'a' && c <= 'z') && !(c >= 'A' && c <= 'Z') && !(c >= '-' && c <= '9' && c != '/') && c != '_') return false;
  return !name.empty();
}

/// Takes the characters before `end` (npos: all) off the front of a text.
inline std::string_view take_front(std::string_view& from, size_t end) {
  const std::string_view front = from.substr(0, end);
  from.remove_prefix(front.size());
  return front;
}
/// Takes a sign off the front. Returns whether it is a minus.
inline bool take_sign(std::string_view& from) {
  return take_front(from, !from.empty() && (from[0] == '-' || from[0] == '+') ? 1 : 0) == "-";
}
/// The value of a hex digit, or 16 for any other character.
inline int64_t hex_digit(char c) { return static_cast<int64_t>(std::min<size_t>(kHexDigits.find(lower(c)), 16)); }

/// A whole number: digits only, unless a sign is allowed. Nothing for anything else, overflow included.
inline std::optional<int64_t> decimal(std::string_view digits, bool sign_allowed = false, int64_t base = 10) {
  const int64_t sign = sign_allowed && take_sign(digits) ? -1 : 1;
  if (digits.empty()) return std::nullopt;
  int64_t number = 0;
  for (char c : digits) {
    const int64_t digit = hex_digit(c);
    if (digit >= base || __builtin_mul_overflow(number, base, &number)) return std::nullopt;
    if (__builtin_add_overflow(number, sign * digit, &number)) return std::nullopt;
  }
  return number;
}

/// The time of a turn: monotonic for deadlines, wall clock for what is stored or shown. Both in nanoseconds.
struct Now {
  int64_t steady = 0, wall = 0;
};

class Timer;

/// All deadlines of a daemon, the earliest first. Timers are set and fired by the loop's thread only.
struct Timers {
  std::set<std::pair<int64_t, Timer*>> queue;
  int64_t next() const { return queue.empty() ? kNever : queue.begin()->first; }
  void run(int64_t now);
};

/// Calls `fire` once when its time has come, if it was set; destroying it takes it back.
class Timer {
 public:
  Timer(Timers& timers, std::function<void()> fire) : timers_(timers), fire_(std::move(fire)) {}
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  ~Timer() { set(kNever); }
  int64_t due() const { return due_; }
  void set(int64_t due) {
    if (due == due_) return;
    if (due_ != kNever) timers_.queue.erase({due_, this});
    due_ = due;
    if (due_ != kNever) timers_.queue.insert({due_, this});
  }

 private:
  friend struct Timers;
  Timers& timers_;
  std::function<void()> fire_;
  int64_t due_ = kNever;
};

inline void Timers::run(int64_t now) {
  for (size_t most = queue.size(); most > 0 && next() <= now; --most) {  // one set in the past waits for the next turn
    Timer* timer = queue.begin()->second;
    timer->set(kNever);
    const auto fire = timer->fire_;  // a copy: the timer may be destroyed by what it fires
    fire();
  }
}

/// A message's id: 16 characters, opaque to everyone but IdSource.
struct MessageId {
  std::array<char, 16> text;
  bool operator==(const MessageId& other) const { return half(0) == other.half(0) && half(8) == other.half(8); }
  static MessageId from(const char* characters) { return load<MessageId>(characters); }
  uint64_t half(size_t from) const { return load<uint64_t>(text.data() + from); }
  uint64_t hash() const {  // ids differ in their last characters, which are the highest bits here: fold them down first
    uint64_t mixed = half(0) ^ (half(8) * 0x9E3779B97F4A7C15u);
    mixed = (mixed ^ (mixed >> 32)) * 0xD6E8FEB86659FD93u;
    return mixed >> 32;
  }
};

/// Makes ids as nsqd 1.3.0 lays them out: 42 bits of time in steps of 2^20 ns, 10 bits of node, 12 bits of sequence, in 16
/// lower-case hex digits. Always: each id is larger than the one before; when a step's 4096 are used up, the next step is
/// begun ahead of the clock, where nsqd makes its publisher sleep.
class IdSource {
 public:
  explicit IdSource(int64_t node) : node_(static_cast<uint64_t>(node) << 12) {}
  const MessageId& next(int64_t wall) {
    static constexpr int64_t kTwepoch = 1288834974288;  // nsqd 1.3.0's own zero
    const auto step = static_cast<uint64_t>((wall >> 20) - kTwepoch);
    if (step > step_ || ++sequence_ == 4096) {
      step_ = std::max(step, step_ + 1);
      sequence_ = 0;
      write(step_ << 22 | node_);
    }
    const uint64_t last = digit(sequence_ >> 8) << 16 | digit(sequence_ >> 4) << 8 | digit(sequence_);
    put_be(&id_.text[8], front_ | last);  // one store: to load at once what was stored in pieces would stall append()
    return id_;
  }
  /// Never make an id below this one again: it was found in the log at the start.
  void skip_past(const MessageId& id) {
    const auto number = static_cast<uint64_t>(decimal({id.text.data(), 16}, false, 16).value_or(0));  // 0: not one of ours
    if ((number & 0x3FF000) == node_) step_ = std::max(step_, (number >> 22) + 1);
  }

 private:
  static uint64_t digit(uint64_t number) { return static_cast<uint8_t>(kHexDigits[number & 15]); }
  void write(uint64_t number) {
    for (size_t i = 16; i-- > 0; number >>= 4) id_.text[i] = kHexDigits[number & 15];
    front_ = get_be<uint64_t>(&id_.text[8]) >> 24 << 24;
  }
  MessageId id_{};
  uint64_t front_ = 0;  // its last eight digits, without those of the sequence
  uint64_t node_, step_ = 0, sequence_ = 0;
};

/// Tells a damaged or foreign record from a whole one: products of 128 bits, folded, of two lanes with 16 bytes a round each.
/// The last round takes the last 32 bytes, and may take some a second time.
inline uint32_t checksum(uint64_t seed, const char* data, size_t size) {
  __extension__ using Wide = unsigned __int128;
  constexpr uint64_t kOdd = 0x9E3779B97F4A7C15u, kOther = 0xD6E8FEB86659FD93u;
  auto mix = [](uint64_t a, uint64_t b) {
    const Wide product = Wide{a} * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  };
  uint64_t a = seed ^ (size * kOdd), b = seed ^ kOther;
  auto round = [&](const char* at) {
    a = mix(a ^ load<uint64_t>(at), kOdd ^ load<uint64_t>(at + 8));
    b = mix(b ^ load<uint64_t>(at + 16), kOdd ^ load<uint64_t>(at + 24));
  };
  std::array<char, 32> padded{};
  if (size < padded.size()) {
    std::string_view(data, size).copy(padded.data(), size);
    data = padded.data();
  }
  const char* const last = data + std::max(size, padded.size()) - padded.size();
  for (; data < last; data += 32) round(data);
  round(last);
  const uint64_t folded = mix(a ^ kOther, b ^ kOdd);
  return static_cast<uint32_t>(folded ^ (folded >> 32));
}

inline std::string host_name() {
  std::array<char, 256> name{};
  return ::gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "localhost";
}

inline std::string time_text(const char* format, const tm& time) {
  std::array<char, 48> shown{};
  return {shown.data(), std::strftime(shown.data(), shown.size(), format, &time)};
}

/// A Go-style duration (1h2m3.5s), as nsqd shows the time that it has been up.
inline std::string duration_text(int64_t nanoseconds) {
  auto in = [](int64_t amount, int64_t unit, std::string_view name) {  // units are powers of 10
    std::string fraction = std::to_string(unit + amount % unit).replace(0, 1, ".");
    fraction.erase(fraction.find_last_not_of(".0") + 1);
    return text(amount / unit, fraction, name);
  };
  if (nanoseconds == 0) return "0s";
  if (nanoseconds < kMillisecond) return in(nanoseconds, kMicrosecond, "\xC2\xB5s");
  if (nanoseconds < kSecond) return in(nanoseconds, kMillisecond, "ms");
  const int64_t minutes = nanoseconds / kSecond / 60;
  const std::string seconds = in(nanoseconds % (60 * kSecond), kSecond, "s");
  if (minutes == 0) return seconds;
  return minutes < 60 ? text(minutes, "m", seconds) : text(minutes / 60, "h", minutes % 60, "m", seconds);
}

// ---------------------------------------------------------------------------------------------------------------------
// [3] Logger
//
// Lines for people, in nsqd's format: <prefix>2026/11/22 07:08:50.100602 INFO: <text>. (The messages are in the log, [6].)
// ---------------------------------------------------------------------------------------------------------------------

class Logger {
 public:
  explicit Logger(const Options& options) : level_(options.log_level), prefix_(options.log_prefix), sink_(options.log) {}
  bool wants(Level level) const { return level >= level_; }
  void set_level(Level level) { level_ = level; }

  template <typename... Parts>
  void say(Level level, const Parts&... parts) const {
    if (wants(level)) write(line(prefix_, level, text(parts...)));
  }

  static std::string line(std::string_view prefix, Level level, std::string_view message) {
    static constexpr std::array<std::string_view, 6> kNames = {"", "DEBUG", "INFO", "WARNING", "ERROR", "FATAL"};
    timespec now{};
    tm local{};
    ::clock_gettime(CLOCK_REALTIME, &now);
    const std::string stamp = time_text("%Y/%m/%d %H:%M:%S", *::localtime_r(&now.tv_sec, &local));
    const std::string fraction = std::to_string(1000000 + now.tv_nsec / 1000).replace(0, 1, ".");
    return text(prefix, stamp, fraction, " ", kNames[static_cast<size_t>(level)], ": ", message);
  }

 private:
  void write(std::string entry) const {
    for (char& c : entry)  // whatever a client calls itself, it stays on one line
      if (c == '\n' || c == '\r') c = ' ';
    if (sink_) return sink_(entry);
    entry += '\n';
    [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, entry.data(), entry.size());  // nowhere to complain
  }
  Level level_;
  std::string prefix_;
  std::function<void(std::string_view)> sink_;
};

// ---------------------------------------------------------------------------------------------------------------------
// [4] JSON
//
// A value, a strict parser and a writer, all after Go's encoding/json, which nsqd's clients and tools were tested with.
// Always: whatever the input, the parser ends with a value or an error, in linear time and with a bounded stack.
// ---------------------------------------------------------------------------------------------------------------------

/// A parsed value. Numbers keep their text, so that 1.0 and 1e3 can be told from integers.
struct Json {
  enum class Type { kNull, kBool, kNumber, kString, kArray, kObject };
  Type type = Type::kNull;
  bool boolean = false;
  std::string string;             // of a string, unescaped; of a number or a truth value, its text
  std::vector<std::string> keys;  // of an object, in step with items
  std::vector<Json> items;

  bool is(Type wanted) const { return type == wanted; }
  /// The member of that name in any case, as in Go, and the last of several; null where there is none.
  const Json* find(std::string_view key) const {
    for (size_t i = keys.size(); i-- > 0;)
      if (same_word(keys[i], key)) return &items[i];
    return nullptr;
  }
  /// Likewise; a null value where there is none.
  const Json& get(std::string_view key) const {
    static const Json kNull;
    const Json* found = find(key);
    return found == nullptr ? kNull : *found;
  }
  std::optional<int64_t> integer() const { return is(Type::kNumber) ? decimal(string, true) : std::nullopt; }
};

/// Reads the value of a whole text; `error` is empty or says what is wrong, and where. With `toml` values are as in the
/// config file, whose reader uses the parts below: with comments, 'strings' without escapes, tabs in strings, a comma
/// after the last item, and without objects and nulls; what begins like a number is taken for one.
class JsonParser {
 public:
  explicit JsonParser(std::string_view input, bool toml = false) : input_(input), rest_(input), toml_(toml) {}
  std::string error;

  Json parse() {
    Json value = parse_value();
    if (skip_space(); !at_end()) fail("unexpected text after the value");
    return error.empty() ? value : Json();
  }
  /// Keeps the first error, and goes to the end of the input, where everything that was begun ends by itself.
  void fail(std::string_view why) {
    const std::string_view before = input_.substr(0, input_.size() - rest_.size());
    const auto line = 1 + std::count(before.begin(), before.end(), '\n');
    const auto column = before.size() - before.rfind('\n');  // npos is -1
    if (error.empty()) error = text(why, " at line ", line, ", column ", column);
    rest_ = {};
  }
  bool at_end() const { return rest_.empty(); }
  char next() const { return at_end() ? '\0' : rest_[0]; }
  bool at_quote() const { return next() == '"' || (next() == '\'' && toml_); }
  std::string_view take_word(std::string_view ends) { return take_front(rest_, rest_.find_first_of(ends)); }
  void skip_space() {
    const char* space = toml_ && depth_ == 0 ? " \t\r" : " \t\r\n";  // a line of TOML ends, unless brackets are open
    while (take_front(rest_, rest_.find_first_not_of(space)), toml_ && next() == '#') take_word("\n");
  }
  bool take(char c) {
    skip_space();
    return !take_front(rest_, next() == c ? 1 : 0).empty();
  }
  Json parse_value() {
    Json value;
    skip_space();
    if (next() == '[' || (next() == '{' && !toml_)) parse_members(value);
    else if (at_quote()) value.type = Json::Type::kString, value.string = parse_string();
    else parse_word(value);
    return value;
  }
  std::string parse_string() {
    const std::string_view quote = take_front(rest_, 1);
    std::string out;
    for (auto c = take_front(rest_, 1); c != quote; c = take_front(rest_, 1)) {
      if (c.empty()) return fail("unexpected end in a string"), "";
      if (static_cast<uint8_t>(c[0]) < 0x20 && !(c == "\t" && toml_)) fail("control character in a string");
      else if (c == "\\" && quote == "\"") parse_escape(out);
      else out += c;
    }
    return out;
  }

 private:
  void parse_members(Json& value) {
    const char close = take_front(rest_, 1) == "{" ? '}' : ']';
    const bool object = close == '}';
    value.type = object ? Json::Type::kObject : Json::Type::kArray;
    if (++depth_ > 64) return fail("nested too deeply");
    for (bool first = true; !take(close); first = false) {
      if (!first && !take(',')) return fail(text("expected ',' or '", std::string(1, close), "'"));
      if (!first && toml_ && take(close)) break;
      Json member = parse_value();
      if (object && (!member.is(Json::Type::kString) || !take(':'))) return fail("expected a name in quotes and ':'");
      if (object) value.keys.push_back(std::exchange(member, parse_value()).string);
      value.items.push_back(std::move(member));
    }
    --depth_;
  }
  void parse_word(Json& value) {
    const std::string_view word = take_word(" \t\r\n,]}#");
    if (word == "true" || word == "false") value.type = Json::Type::kBool;
    else if (toml_ ? word.find_first_of("+-0123456789") == 0 : is_number(word)) value.type = Json::Type::kNumber;
    else if (toml_ || word != "null") return fail("expected a value");
    value.boolean = word == "true";
    value.string = value.type == Json::Type::kNull ? "" : word;
  }
  static bool is_number(std::string_view word) {
    auto digits = [&word] { return !take_front(word, word.find_first_not_of(kDigits)).empty(); };
    auto one_of = [&word](std::string_view set) { return !take_front(word, set.find(word.substr(0, 1)) < 9).empty(); };
    one_of("-");
    const bool whole = one_of("0") || digits(), fraction = !one_of(".") || digits();
    return whole && fraction && (!one_of("eE") || (one_of("+-"), digits())) && word.empty();
  }

  /// What follows a backslash. As in Go, half of a pair that stands alone is read as U+FFFD.
  void parse_escape(std::string& out) {
    static constexpr std::string_view kLetters = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
    const size_t letter = kLetters.find(next());
    uint32_t code = letter < 8 ? static_cast<uint32_t>(kMeanings[letter]) : unit_after("u");
    if (code > 0xFFFF) return fail("unknown escape in a string");
    take_front(rest_, letter < 8 ? 1 : 5);
    const uint32_t second = unit_after("\\u");
    if (code >> 10 == 0xD800 >> 10 && second >> 10 == 0xDC00 >> 10) {
      code = 0x10000 + ((code & 0x3FF) << 10) + (second & 0x3FF);
      take_front(rest_, 6);
    }
    append_utf8(out, code >> 11 == 0xD800 >> 11 ? 0xFFFD : code);
  }
  /// The number in four hex digits after that prefix, or 0x10000 where there is something else.
  uint32_t unit_after(std::string_view prefix) const {
    const auto digits = rest_.substr(0, prefix.size()) == prefix ? rest_.substr(prefix.size(), 4) : "";
    return static_cast<uint32_t>(decimal(digits, false, 16).value_or(0x10000));
  }
  static void append_utf8(std::string& out, uint32_t code) {
    static constexpr std::array<uint32_t, 4> kLead = {0, 0xC0, 0xE0, 0xF0};
    const uint32_t more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    out += static_cast<char>(kLead[more] | code >> (6 * more));
    for (uint32_t i = more; i-- > 0;) out += static_cast<char>(0x80 | (code >> (6 * i) & 0x3F));
  }

  std::string_view input_, rest_;
  bool toml_;
  int depth_ = 0;
};

/// The length of the UTF-8 character at the front of `s`, or 0 where its bytes are not UTF-8 (RFC 3629).
inline size_t utf8_length(std::string_view s) {
  const auto first = static_cast<uint8_t>(s[0]), second = static_cast<uint8_t>(s.size() > 1 ? s[1] : 0);
  const size_t size = first < 0x80 ? 1 : first < 0xC2 ? 0 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : first < 0xF5 ? 4 : 0;
  const bool too_low = (first == 0xE0 && second < 0xA0) || (first == 0xF0 && second < 0x90);   // fewer would do
  const bool too_high = (first == 0xED && second > 0x9F) || (first == 0xF4 && second > 0x8F);  // no character
  for (size_t i = 1; i < size; ++i)
    if (i >= s.size() || (static_cast<uint8_t>(s[i]) & 0xC0) != 0x80) return 0;
  return too_low || too_high ? 0 : size;
}

/// `c` as `\x1f`, `\u001f` and the like: a prefix and lower-case hex digits.
inline std::string hex_escape(std::string_view prefix, uint32_t c, int digits) {
  std::string escaped(prefix);
  for (int i = digits - 1; i >= 0; --i) escaped += "0123456789abcdef"[c >> (4 * i) & 15];
  return escaped;
}

/// A text in quotes: as Go writes JSON, fit for HTML and JavaScript, where a byte that is not UTF-8 becomes U+FFFD; or, for
/// a name in an error's text, as Go's %q writes it.
inline std::string quoted(std::string_view s, bool json = false) {
  static constexpr std::string_view kPlain = "\"\\\n\r\t\a\b\f\v", kLetter = "\"\\nrtabfv";
  std::string quoted = "\"";
  while (!s.empty()) {
    const size_t size = utf8_length(s), letter = kPlain.find(s[0]);
    const std::string_view character = take_front(s, std::max<size_t>(size, 1));
    const auto c = static_cast<uint8_t>(character[0]);
    if (letter < (json ? 5 : kPlain.size())) quoted += {'\\', kLetter[letter]};
    else if (!json && (size == 0 || c < 0x20 || c == 0x7F)) quoted += hex_escape("\\x", c, 2);
    else if (!json) quoted += character;
    else if (size == 0) quoted += "\\ufffd";
    else if (c < 0x20 || c == '<' || c == '>' || c == '&') quoted += hex_escape("\\u", c, 4);
    else if (character == "\xE2\x80\xA8" || character == "\xE2\x80\xA9") quoted += text("\\u202", character[2] & 15);
    else quoted += character;
  }
  return quoted + '"';
}

/// Writes JSON with nsqd's order of keys (that of the calls) and no spaces.
class JsonWriter {
 public:
  std::string out;

  /// Appends what is JSON already, after a comma where one is needed.
  JsonWriter& raw(std::string_view json) {
    const char last = out.empty() ? '[' : out.back();
    out += last == '[' || last == '{' || last == ':' ? "" : ",";
    out += json;
    return *this;
  }
  JsonWriter& open(char bracket) { return raw({&bracket, 1}); }
  JsonWriter& close(char bracket) { return out += bracket, *this; }
  JsonWriter& key(std::string_view name) { return raw(quoted(name, true) + ':'); }
  template <typename Value>
  JsonWriter& member(std::string_view name, const Value& v) { return key(name).value(v); }
  /// A truth value, a number, a text, or a list of these.
  template <typename Value>
  JsonWriter& value(const Value& v) {
    if constexpr (std::is_same_v<Value, bool>) return raw(v ? "true" : "false");
    else if constexpr (std::is_integral_v<Value>) return raw(std::to_string(v));
    else if constexpr (std::is_floating_point_v<Value>) return raw(number(v));
    else if constexpr (std::is_convertible_v<const Value&, std::string_view>) return raw(quoted(v, true));
    else {
      open('[');
      for (const auto& item : v) value(item);
      return close(']');
    }
  }

 private:
  static std::string number(double v) {  // 15 digits go through a double unchanged
    std::array<char, 32> digits{};
    std::snprintf(digits.data(), digits.size(), "%.15g", v);
    return digits.data();
  }
};
// ---------------------------------------------------------------------------------------------------------------------
// [5] Data path
//
// The directory that holds everything, its lock, and nsqd.dat, the names of topics and channels.
// Always: one daemon per directory; nsqd.dat is either the old one or the new one, whole, whenever the machine stops.
// ---------------------------------------------------------------------------------------------------------------------

/// Holds the lock of the data path as nsqd does (flock on the directory itself), so that the two exclude each other.
class DirectoryLock {
 public:
  explicit DirectoryLock(const std::string& path) : fd_(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
    const std::string_view words = "failed to instantiate nsqd - failed to lock data-path: ";
    if (!fd_)
      throw std::runtime_error(text(words, "open ", path, ": ", lower(std::strerror(errno)),
                                    errno == EACCES ? "" : " (--data-path must name a directory that exists)"));
    if (::flock(fd_.get(), LOCK_EX | LOCK_NB) != 0)
      throw std::runtime_error(text(words, "cannot flock directory ", path, " - resource temporarily unavailable "
                                    "(possibly in use by another instance of nsqd)"));
  }

 private:
  Fd fd_;
};

inline Status write_whole(int fd, std::string_view content, const std::string& path) {
  while (!content.empty()) {
    const ssize_t written = ::write(fd, content.data(), content.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return system_error("write", path);
    content.remove_prefix(static_cast<size_t>(written));
  }
  return {};
}

/// Brings a file or directory to the disk; one that is gone has nothing left to sync.
inline Status sync_path(const std::string& path) {
  const Fd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) return errno == ENOENT ? Status{} : system_error("open", path);
  return ::fsync(file.get()) == 0 ? Status{} : system_error("fsync", path);
}

/// Replaces a file so that it is whole at any moment: write aside, fsync, rename, fsync the directory.
inline Status replace_file(const std::string& directory, const std::string& name, std::string_view content) {
  const std::string path = directory + "/" + name, aside = path + ".tmp";
  Status status;
  {
    const Fd file(::open(aside.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
    if (!file) return system_error("open", aside);
    status = write_whole(file.get(), content, aside);
    if (status.ok() && ::fsync(file.get()) != 0) status = system_error("fsync", aside);
  }
  if (status.ok() && ::rename(aside.c_str(), path.c_str()) != 0) status = system_error("rename to", path);
  if (status.ok()) return sync_path(directory);
  ::unlink(aside.c_str());
  return status;
}

/// The content of a file; nothing where there is none. Throws for any other reason not to read it.
inline std::optional<std::string> read_file(const std::string& path) {
  const Fd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file && errno == ENOENT) return std::nullopt;
  if (!file) throw_unless(system_error("open", path));
  std::string content;
  std::array<char, 65536> buffer;
  for (ssize_t got = -1; (got = ::read(file.get(), buffer.data(), buffer.size())) != 0;) {
    if (got > 0) content.append(buffer.data(), static_cast<size_t>(got));
    else if (errno != EINTR) throw_unless(system_error("read", path));
  }
  return content;
}

inline size_t file_size(const std::string& path) {
  struct stat about {};
  return ::stat(path.c_str(), &about) == 0 ? static_cast<size_t>(about.st_size) : 0;
}

/// What nsqd.dat holds.
struct Metadata {
  struct Entry {
    std::string name;
    bool paused = false;
    std::vector<Entry> channels = {};  // of a topic
  };
  std::vector<Entry> topics = {};

  /// {"topics":[{"name":"t","paused":false,"channels":[{"name":"c","paused":false}]}],"version":"1.3.0"}, empty lists null.
  std::string json() const {
    JsonWriter json;
    json.open('{');
    write(json, "topics", topics);
    return json.member("version", kProtocolVersion).close('}').out;
  }

  /// Throws, naming file and position, where the text is not what json() writes; unknown members are passed over.
  static Metadata parse(const std::string& content, const std::string& path) {
    JsonParser parser(content);
    const Json root = parser.parse();
    std::string& why = parser.error;
    if (why.empty() && !root.is(Json::Type::kObject)) why = "expected an object";
    Metadata metadata;
    if (why.empty()) metadata.topics = read(root.get("topics"), "topics", why);
    if (why.empty()) return metadata;
    throw std::runtime_error(text("failed to parse metadata in ", path, " - ", why, "; mend the file or move it away"));
  }

 private:
  static void write(JsonWriter& json, std::string_view key, const std::vector<Entry>& entries) {
    json.key(key);
    if (entries.empty()) return void(json.raw("null"));
    json.open('[');
    for (const Entry& entry : entries) {
      json.open('{').member("name", entry.name).member("paused", entry.paused);
      if (key == "topics") write(json, "channels", entry.channels);
      json.close('}');
    }
    json.close(']');
  }
  static std::vector<Entry> read(const Json& list, std::string_view what, std::string& why) {
    using Type = Json::Type;
    if (!list.is(Type::kArray) && !list.is(Type::kNull)) why = text("the list of ", what, " is of the wrong type");
    std::vector<Entry> entries;
    for (const Json& item : list.items) {
      const Json &name = item.get("name"), &paused = item.get("paused");
      if (!name.is(Type::kString) || (!paused.is(Type::kBool) && !paused.is(Type::kNull)))
        why = text("one of the ", what, " has no name, or a value of the wrong type");
      entries.push_back({name.string, paused.boolean});
      if (what == "topics") entries.back().channels = read(item.get("channels"), "channels", why);
    }
    return entries;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// [6] The log
//
// A topic's messages, each stored once, in segments: mapped files, or anonymous memory for what may be forgotten. And the
// ledgers, one per channel: a cursor, and a slot for each message that is out of order.
// Always: a record below a segment's count is whole and never changes; numbers rise by one from record to record; what was
// stored survives the end of the process at any instruction, since it lies in the kernel's page cache.
// ---------------------------------------------------------------------------------------------------------------------

inline constexpr size_t kPageSize = 4096;
inline constexpr size_t kFirstSegment = size_t{1} << 14;    // bytes; so that ten thousand small topics fit anywhere
inline constexpr size_t kWarmSegment = size_t{1} << 23;     // largest one that is kept for reuse when it was emptied
inline constexpr size_t kFewSegments = 4;                   // more of them are a backlog, for which larger ones are made
inline constexpr size_t kLargestSegment = size_t{1} << 30;  // offsets have 31 bits
inline constexpr uint32_t kByteOrder = 0x01020304, kFormatVersion = 3;

/// Files that have no name any more, but their space. To free it takes a while, so it is left to the worker; the loop does it
/// only where the disk is full, or where the worker is so far behind that descriptors would run out. For any thread.
class RemovedFiles {
 public:
  static constexpr size_t kMost = 64;
  void add(Fd file) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (files_.size() == kMost) return;
    files_.push_back(std::move(file));
    more_ = true;
  }
  /// Whether some were added since the last call.
  bool more() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(more_, false);
  }
  /// When it returns, the space of all of them is free, whoever has freed it.
  void close() {
    const std::lock_guard<std::mutex> one_at_a_time(closing_);
    std::vector<Fd> files;
    const std::lock_guard<std::mutex> lock(mutex_);  // and unlocked before these are closed
    files.swap(files_);
  }

 private:
  std::mutex closing_, mutex_;
  std::vector<Fd> files_;
  bool more_ = false;
};

/// Where logs are kept, what of them is not on the disk yet, and what is wrong with the disk.
struct Storage {
  std::string directory;                // empty: nothing is kept
  size_t largest_segment = kLargestSegment;
  std::string full, unsynced;           // why the last segment could not be made, why the last sync failed; empty: it worked
  uint64_t epoch = 1;                   // rises with each sync: a file is dirty when it was touched in this epoch
  uint64_t operations = 0;              // publishes and finishes since the last sync
  std::vector<std::string> dirty = {};  // files touched in this epoch
  bool new_names = false;               // the directory itself has to be synced, too
  uint64_t boot = 0;                    // tells one run of the machine from the next; see Ledger
  RemovedFiles removed;

  std::string health() const { return !full.empty() ? "NOK - " + full : !unsynced.empty() ? "NOK - " + unsynced : "OK"; }
};

/// A file that is mapped, shared with the kernel's page cache, when it is used; or memory that is nobody's else.
class MappedFile {
 public:
  MappedFile(std::string file_path, size_t size) : path_(std::move(file_path)), size_(size) {}
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile() { unmap(); }

  char* data() const { return data_; }
  size_t size() const { return size_; }
  const std::string& path() const { return path_; }
  bool mapped() const { return data_ != nullptr; }
  bool anonymous() const { return path_.empty(); }
  bool touched() const { return epoch_ != 0; }  // since the start

  /// Makes it, all zeros.
  Status create(Storage& storage) {
    Status status = extend(O_CREAT | O_TRUNC, 0, size_);
    if (!status.ok()) remove();
    storage.new_names = true;
    return status;
  }
  /// Makes it larger, with zeros behind what there is.
  Status grow(size_t size) { return extend(0, size_, size); }
  /// Maps what create made, unless it is mapped already.
  Status open() {
    if (mapped()) return {};
    const Fd file(::open(path_.c_str(), O_RDWR | O_CLOEXEC));
    return file ? map(file.get(), size_) : system_error("open", path_);
  }
  /// Gives the memory back to the kernel; the content stays in the file. Memory that is in no file has no other place.
  void close() { if (!anonymous()) unmap(); }
  /// Gives back the space behind `size`.
  void shrink(size_t size) {
    if (size_ <= size || (!anonymous() && ::truncate(path_.c_str(), static_cast<off_t>(size)) != 0)) return;
    if (mapped()) ::munmap(data_ + size, size_ - size);
    size_ = size;
  }
  /// Takes its name away; its space is free when what this returns is closed.
  Fd remove() {
    Fd file(anonymous() ? -1 : ::open(path_.c_str(), O_RDONLY | O_CLOEXEC));
    unmap();
    if (!anonymous()) ::unlink(path_.c_str());
    return file;
  }
  Status rename(const std::string& path, Storage& storage) {
    if (!anonymous() && ::rename(path_.c_str(), path.c_str()) != 0) return system_error("rename", path_);
    if (!anonymous()) path_ = path;
    epoch_ = 0;
    storage.new_names = true;
    return {};
  }
  /// Has the kernel make the pages of a new file by writing zeros, many at a time; returns whether it did. A page that is made
  /// by the first store to it costs far more: measured, 240 against 46 ns for a message of 232 bytes, its copy included.
  bool prepare(size_t offset, size_t size) const {
    static const std::string kZeros(size_t{1} << 16, '\0');
    std::vector<iovec> pieces;
    for (size_t left = size; left > 0; left -= pieces.back().iov_len)
      pieces.push_back({const_cast<char*>(kZeros.data()), std::min(left, kZeros.size())});
    const Fd file(::open(path_.c_str(), O_WRONLY | O_CLOEXEC));
    return ::pwritev(file.get(), pieces.data(), static_cast<int>(pieces.size()), static_cast<off_t>(offset)) > 0;
  }
  /// To be called with each change that a sync has to cover.
  void touch(Storage& storage) {
    if (epoch_ == storage.epoch || anonymous()) return;
    epoch_ = storage.epoch;
    storage.dirty.push_back(path_);
  }

 private:
  /// Space is reserved before it is mapped: a full disk is an error here, and no SIGBUS later.
  Status extend(int flags, size_t from, size_t to) {
    const Fd file(anonymous() ? -1 : ::open(path_.c_str(), O_RDWR | O_CLOEXEC | flags, 0600));
    if (!file && !anonymous()) return system_error("open", path_);
    Status status = anonymous() ? Status() : reserve(file.get(), from, to);
    return status.ok() ? map(file.get(), to) : status;
  }
  Status reserve(int file, size_t from, size_t to) const {
    int code = EINTR;
    while (code == EINTR) code = ::posix_fallocate(file, static_cast<off_t>(from), static_cast<off_t>(to - from));
    if (code == 0) return {};
    if (code != EINVAL && code != EOPNOTSUPP && code != ENOSYS) return system_error("reserve", path_, code);
    ::lseek(file, static_cast<off_t>(from), SEEK_SET);  // a file system that cannot reserve: zeros do it, too
    const std::string zeros(size_t{1} << 16, '\0');
    Status status;
    for (; from < to && status.ok(); from += zeros.size())
      status = write_whole(file, std::string_view(zeros).substr(0, to - from), path_);
    return status;
  }
  /// Maps `size` bytes in place of what is mapped now; memory that is in no file is copied.
  Status map(int file, size_t size) {
    const int flags = file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    void* memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, file, 0);
    if (memory == MAP_FAILED) return system_error("map", anonymous() ? "memory" : path_);
    if (mapped() && anonymous()) std::memcpy(memory, data_, std::min(size, size_));
    unmap();
    data_ = static_cast<char*>(memory);
    size_ = size;
    return {};
  }
  void unmap() {
    if (data_ != nullptr) ::munmap(data_, size_);
    data_ = nullptr;
  }
  std::string path_;
  size_t size_;
  char* data_ = nullptr;
  uint64_t epoch_ = 0;
};

/// The first bytes of segments and ledgers, in host byte order:
///
///    0  8  magic "nsqd-seg" or "nsqd-led"        16  8  number of the first message (ledgers: 0)
///    8  4  0x01020304, to tell the byte order    24  8  size of the file (ledgers, which grow: 0)
///   12  4  version of the format, 3              32  4  checksum of bytes 0 to 31
///
/// It is written after the rest of the file was made, so a header of zeros is that of a file whose making was cut short.
/// Whoever changes the format raises the version; a daemon refuses files of another version than its own.
struct FileHeader {
  enum class Verdict { kGood, kUnfinished, kDamaged };

  static void write(const MappedFile& file, std::string_view magic, uint64_t first, uint64_t size) {
    std::array<char, 36> header{};
    magic.copy(header.data(), 8);
    store(&header[8], kByteOrder);
    store(&header[12], kFormatVersion);
    store(&header[16], first);
    store(&header[24], size);
    store(&header[32], checksum(0, header.data(), 32));
    std::atomic_thread_fence(std::memory_order_release);
    std::memcpy(file.data(), header.data(), header.size());
  }
  /// Throws for a file that this daemon must not touch: of another machine or version, or cut short.
  static Verdict check(const MappedFile& file, std::string_view magic, uint64_t first) {
    const char* header = file.data();
    if (std::string_view(header, 36).find_first_not_of('\0') == std::string_view::npos) return Verdict::kUnfinished;
    if (load<uint32_t>(header + 32) != checksum(0, header, 32) || magic != std::string_view(header, 8)) return Verdict::kDamaged;
    auto refuse = [&file](bool bad, std::string_view why) {
      if (bad) throw std::runtime_error(text(file.path(), " ", why));
    };
    refuse(load<uint32_t>(header + 8) != kByteOrder, "was written on a machine of another byte order; read it there");
    refuse(load<uint32_t>(header + 12) > kFormatVersion,
           "was written by a later version of this program; use that one, or move the file away");
    refuse(load<uint32_t>(header + 12) < kFormatVersion,
           "was written by an earlier version of this program; let that one deliver it, or move the file away");
    refuse(load<uint64_t>(header + 24) > file.size(), "is shorter than it was made; restore it from a copy, or move it away");
    return load<uint64_t>(header + 16) == first ? Verdict::kGood : Verdict::kDamaged;
  }
};

/// Consecutive messages of one topic, in the form in which they go out: whole frames with attempts = 1.
///
///    header   0 .. 35   see FileHeader
///    tally   40  8      count of records, then its complement; stored last
///    mark    48  8      how many of them were handed to the channels, then the complement; kFollows: all
///    frames  56 ..      one after the other: [ due 8, deferred ones only ] size 4, type 4, timestamp 8, attempts 2, id 16, body
///    slots   .. end     8 bytes each, the first one last: offset of the frame (top bit: deferred) 4, checksum 4
///
/// Frames grow from the front and slots from the back, so both have room whatever the size of the messages. The checksum
/// covers due, frame and the record's number: what an earlier use of the file left behind is never taken for a record. tally
/// and mark are one aligned word each, so a killed process leaves the old or the new one.
/// Always: frames end at or before the slots begin; `sealed` segments get no further record.
class Segment {
 public:
  static constexpr size_t kFrames = 56;
  static constexpr size_t kFrameHead = 8 + 26;  // size, type, and a message without its body
  static constexpr uint32_t kFollows = 0xFFFFFFFF, kDeferred = 0x80000000;
  static constexpr uint32_t kMessage = 2;  // the type of such frames
  static constexpr std::string_view kMagic = "nsqd-seg";

  Segment(std::string path, size_t size, uint64_t first_number)
      : file(std::move(path), size), first(first_number), prepared_(file.anonymous() || size < 2 * kPrepared ? size : 0) {}

  MappedFile file;
  uint64_t first;                      // number of its first message
  uint32_t count = 0;                  // records that are part of it
  uint32_t deferred_records = 0;       // how many of them were published with a delay
  bool sealed = false;
  size_t readers = 0;                  // channels whose cursor is in it
  size_t held = 0;                     // its messages that a channel has passed and not finished
  std::vector<uint32_t> damaged = {};  // records that recovery found broken; no channel ever gets them

  uint64_t end() const { return first + count; }
  bool deferred(uint32_t i) const { return deferred_records > 0 && (slot_offset(i) & kDeferred) != 0; }
  const char* frame(uint32_t i) const { return file.data() + (slot_offset(i) & ~kDeferred); }
  const char* frame_of(uint64_t number) const { return frame(static_cast<uint32_t>(number - first)); }
  int64_t due_of(uint32_t i) const { return load<int64_t>(frame(i) - 8); }
  static size_t frame_size(const char* frame) { return 4 + size_t{get_be<uint32_t>(frame)}; }
  static MessageId id_of(const char* frame) { return MessageId::from(frame + 18); }
  static int64_t timestamp_of(const char* frame) { return get_be<int64_t>(frame + 8); }
  /// The checksum of a record: of its id and body as bytes, of the rest by what it starts from. (Bytes that were just stored
  /// one by one are slow to load eight at a time.)
  static uint32_t sum(uint64_t number, const char* frame, int64_t due) {
    const auto times = static_cast<uint64_t>(timestamp_of(frame)) ^ static_cast<uint64_t>(due) << 1;
    const uint64_t attempts = load<uint16_t>(frame + 16);
    return checksum(number ^ times * 0x9E3779B97F4A7C15u ^ attempts << 48, frame + 18, frame_size(frame) - 18);
  }

  /// Makes an empty segment of a new file or a spare one.
  void begin(uint64_t first_number, bool follows) {
    first = first_number;
    deferred_records = 0;
    sealed = false;
    damaged.clear();
    end_of_frames_ = kFrames;
    prepare(kFrames);
    std::memset(file.data(), 0, kFrames);
    set_word(kTally, count = written_ = 0);
    set_word(kMark, follows ? kFollows : 0);
    FileHeader::write(file, kMagic, first, file.size());
  }
  bool has_room(size_t body, bool with_due) const {
    const size_t frames = end_of_frames_ + kFrameHead + body + (with_due ? 8 : 0);
    return !sealed && frames + 8 * (size_t{written_} + 1) <= file.size();
  }
  /// Writes a record, which counts from the next commit() on. Needs has_room.
  void append(const MessageId& id, int64_t timestamp, std::string_view body, int64_t due, uint16_t attempts) {
    const size_t before = due != 0 ? 8 : 0, size = before + kFrameHead + body.size();
    prepare(end_of_frames_ + size);
    char* const begin = file.data() + end_of_frames_;
    for (size_t ahead = 2048; ahead < 2048 + size; ahead += 64) __builtin_prefetch(begin + ahead, 1);  // later ones are alike
    char* at = begin + before;
    if (due != 0) store(begin, due);
    const auto offset = static_cast<uint32_t>(end_of_frames_ + before);
    put_be(at, static_cast<uint32_t>(kFrameHead - 4 + body.size()));
    put_be(at + 4, kMessage);
    put_be(at + 8, timestamp);
    put_be(at + 16, attempts);
    store(at + 18, id.half(0));  // by halves, as they were stored: see IdSource
    store(at + 26, id.half(8));
    body.copy(at + kFrameHead, body.size());
    store(slot(written_), due != 0 ? offset | kDeferred : offset);
    store(slot(written_) + 4, sum(first + written_, begin + before, due));
    end_of_frames_ += size;
    if (due != 0) ++deferred_records;
    ++written_;
  }
  void commit(Storage& storage) {
    if (written_ == count) return;
    storage.operations += written_ - count;
    set_word(kTally, count = written_);
    file.touch(storage);
  }
  /// Forgets the records from `records` on. What is behind them is no record any more, even without the tally.
  void truncate(uint32_t records, Storage& storage) {
    end_of_frames_ = static_cast<size_t>(frame(records) - file.data()) - (deferred(records) ? 8 : 0);
    for (uint32_t i = records; i < count; ++i) store(slot(i), uint64_t{0});
    set_word(kTally, count = written_ = records);
    while (!damaged.empty() && damaged.back() >= records) damaged.pop_back();
    sealed = !damaged.empty();
    file.touch(storage);
  }
  void set_mark(uint32_t handed, Storage& storage) {
    set_word(kMark, handed);
    file.touch(storage);
  }
  uint32_t mark() const { return word(kMark).value_or(0); }

  /// Takes every whole record of a file that an earlier process left. Records that are broken behind the last whole one are
  /// a torn tail, cut off where `is_tail`; others are damage. Throws for a file that must not be touched; returns false for
  /// one that holds nothing and can go.
  bool recover(bool is_tail, const Logger& logger) {
    const auto verdict = FileHeader::check(file, kMagic, first);
    const auto tally = verdict == FileHeader::Verdict::kGood ? word(kTally) : std::nullopt;
    uint32_t whole = 0, i = 0;  // whole: one more than the last whole record
    for (; i < tally.value_or(kFollows) && end_of_frames_ + 8 * (size_t{i} + 1) <= file.size(); ++i) {
      if (!tally && load<uint64_t>(slot(i)) == 0) break;
      if (take(i)) whole = i + 1;
      else damaged.push_back(i);
    }
    if (!tally && whole == 0) {
      const bool blank = load<uint64_t>(slot(0)) == 0 && load<uint64_t>(file.data() + kFrames) == 0;
      if (blank || verdict != FileHeader::Verdict::kDamaged) return false;
      throw std::runtime_error(file.path() + " is no segment, or damaged beyond repair; restore it from a copy, or move it away");
    }
    const uint32_t kept = is_tail || !tally ? whole : i;
    while (!damaged.empty() && damaged.back() >= kept) damaged.pop_back();
    if (!tally) logger.say(Level::kWarning, "LOG: ", file.path(), " has a damaged header at offset 0; kept ", kept, " messages");
    else if (kept < i) logger.say(Level::kInfo, "LOG: ", file.path(), " ends in ", i - kept, " torn messages; kept ", kept);
    for (uint32_t each : damaged)
      logger.say(Level::kError, "LOG: ", file.path(), " message ", first + each, " is damaged at offset ",
                 slot_offset(each) & ~kDeferred, "; left out");
    set_word(kTally, count = written_ = kept);
    if (verdict == FileHeader::Verdict::kDamaged) FileHeader::write(file, kMagic, first, file.size());
    prepared_ = file.size();
    sealed = !is_tail || !damaged.empty();  // where its frames end is known for certain only when all of them are whole
    return true;
  }

 private:
  static constexpr size_t kTally = 40, kMark = 48;
  static constexpr size_t kPrepared = size_t{1} << 19;  // bytes at a time; a small segment is not worth it

  static uint64_t twofold(uint32_t value) { return value | static_cast<uint64_t>(~value) << 32; }
  void set_word(size_t offset, uint32_t value) {
    std::atomic_thread_fence(std::memory_order_release);
    store(file.data() + offset, twofold(value));
  }
  std::optional<uint32_t> word(size_t offset) const {
    const auto both = load<uint64_t>(file.data() + offset);
    return both == twofold(static_cast<uint32_t>(both)) ? std::optional(static_cast<uint32_t>(both)) : std::nullopt;
  }
  char* slot(uint32_t i) const { return file.data() + file.size() - 8 * (size_t{i} + 1); }
  uint32_t slot_offset(uint32_t i) const { return load<uint32_t>(slot(i)); }

  /// Sees to it that the pages of the frames up to `end` are there, and those of their slots, which for messages of common
  /// sizes take less than an eighth of that. It writes zeros, so it comes before anything is stored there.
  void prepare(size_t end) {
    while (prepared_ < end) {
      const size_t slots = file.size() - 8 * size_t{written_}, free = (slots - 8) / kPageSize * kPageSize;
      const size_t size = std::min(kPrepared, free - std::min(prepared_, free)), back = file.size() - prepared_ / 8;
      if (size == kPrepared && back <= slots && prepared_ + size + size / 8 <= back) file.prepare(back - size / 8, size / 8);
      prepared_ = size > 0 && file.prepare(prepared_, size) ? prepared_ + size : file.size();
    }
  }
  /// Whether record i is whole; notes where it ends and whether it is deferred.
  bool take(uint32_t i) {
    const bool due = (slot_offset(i) & kDeferred) != 0;
    const size_t at = slot_offset(i) & ~kDeferred, begin = due ? at - 8 : at, slots = file.size() - 8 * (size_t{i} + 1);
    if (at < kFrames + (due ? 8 : 0) || at > slots || slots - at <= kFrameHead) return false;
    const bool behind_damage = !damaged.empty() && damaged.back() + 1 == i;  // else neighbours touch: they go out as one run
    if (behind_damage ? begin < end_of_frames_ : begin != end_of_frames_) return false;
    const size_t size = frame_size(file.data() + at);
    if (size <= kFrameHead || size > slots - at || get_be<uint32_t>(file.data() + at + 4) != kMessage) return false;
    if (load<uint32_t>(slot(i) + 4) != sum(first + i, file.data() + at, due ? due_of(i) : 0)) return false;
    end_of_frames_ = at + size;
    if (due) ++deferred_records;
    return true;
  }
  uint32_t written_ = 0;  // records written, committed or not
  size_t end_of_frames_ = kFrames;
  size_t prepared_;  // so many bytes of the file have pages, or are not worth it
};

/// What a channel has to remember: the number of the first message that it never delivered, its cursor, and the messages
/// before it that are not finished, each in a slot. One file per channel, which grows with what is unfinished at a time.
///
///    header   0 .. 35   see FileHeader
///    cursor  40  8      as sealed() writes a number
///    safe    48  8      a cursor for which all slots are known to be on the disk; the sync writes it, see sync_file
///    boot    56  8      of the machine's run in which all this was written
///    total   64  8      checksum of cursor and slots at the end of the process
///    slots   96 ..      32 bytes each: number 8 (sealed; 0: free), due 8 (wall clock, ns; 0: at once), attempts 2, kind 2
///
/// A gap (kind 1) is a run of messages at or above the cursor that the channel shall not get: from `number` to before `due`.
/// The kernel keeps order for a process that is killed: a slot is filled before the cursor passes its message, and freed when
/// that is finished. A power cut keeps no order, so after one the channel goes back to `safe`, and what it had finished since
/// comes again; unless the file is just as the last process left it, which `total` tells.
/// Always: at most one slot per message; no page boundary is within a slot.
class Ledger {
 public:
  static constexpr size_t kSlots = 96, kSlot = 32, kCursor = 40, kSafe = 48, kBoot = 56, kTotal = 64;
  static constexpr uint16_t kHeld = 0, kGap = 1;
  static constexpr std::string_view kMagic = "nsqd-led", kSuffix = ".ledger";

  Ledger(const std::string& path, Storage& storage) : file(path, std::max(kPageSize, file_size(path))), storage_(storage) {}
  MappedFile file;

  /// 48 bits of a number and 16 that tell whether it is one.
  static uint64_t sealed(uint64_t number) { return number << 16 | ((number + 1) * 0x9E3779B97F4A7C15u >> 48 | 1); }
  static std::optional<uint64_t> unsealed(uint64_t word) {
    return word == sealed(word >> 16) ? std::optional(word >> 16) : std::nullopt;
  }

  Status create(uint64_t cursor) {
    Status status = file.create(storage_);
    if (!status.ok()) return status;
    made_ = true;
    store(file.data() + kSafe, sealed(cursor));
    store(file.data() + kBoot, storage_.boot);
    set_cursor(cursor);
    FileHeader::write(file, kMagic, 0, 0);
    return status;
  }
  /// Maps it, and makes it first where that was not done yet.
  Status open(uint64_t cursor) { return made_ ? file.open() : create(cursor); }
  uint32_t slots() const { return static_cast<uint32_t>((file.size() - kSlots) / kSlot); }
  Status grow() { return file.grow(file.size() * 2); }

  void set_cursor(uint64_t cursor) { put_number(kCursor, cursor); }

  void fill(uint32_t i, uint64_t number, int64_t due, uint16_t attempts, uint16_t kind) {
    store(slot(i) + 8, due);
    store(slot(i) + 16, attempts);
    store(slot(i) + 18, kind);
    put_number(place(i), number);
  }
  void free(uint32_t i) { store(slot(i), uint64_t{0}), file.touch(storage_); }
  void set_due(uint32_t i, int64_t due) { store(slot(i) + 8, due), file.touch(storage_); }
  void set_attempts(uint32_t i, uint16_t attempts) { store(slot(i) + 16, attempts), file.touch(storage_); }

  bool used(uint32_t i) const { return word(place(i)) != 0; }
  uint64_t number(uint32_t i) const { return word(place(i)) >> 16; }
  int64_t due(uint32_t i) const { return load<int64_t>(slot(i) + 8); }
  uint16_t attempts(uint32_t i) const { return load<uint16_t>(slot(i) + 16); }
  uint16_t kind(uint32_t i) const { return load<uint16_t>(slot(i) + 18); }

  /// Maps the file of an earlier process. Returns the cursor that it may be trusted with, nothing where it is damaged.
  std::optional<uint64_t> recover() {
    if (file_size(file.path()) < kPageSize) return std::nullopt;
    throw_unless(file.open());
    made_ = true;
    if (FileHeader::check(file, kMagic, 0) != FileHeader::Verdict::kGood) return std::nullopt;
    for (uint32_t i = 0; i < slots(); ++i)
      if (used(i) && !unsealed(word(place(i)))) return std::nullopt;
    const bool as_left = word(kBoot) == storage_.boot || word(kTotal) == total();
    const auto trusted = unsealed(word(as_left ? kCursor : kSafe));
    if (trusted && word(kCursor) != sealed(*trusted)) set_cursor(*trusted);
    store(file.data() + kBoot, storage_.boot);
    return trusted;
  }
  /// The end of the process, at which nothing changes any more.
  void close_for_good() { if (file.touched() && file.open().ok()) store(file.data() + kTotal, total()); }

 private:
  static size_t place(uint32_t i) { return kSlots + size_t{i} * kSlot; }
  char* slot(uint32_t i) const { return file.data() + place(i); }
  uint64_t word(size_t offset) const { return load<uint64_t>(file.data() + offset); }
  void put_number(size_t offset, uint64_t number) {
    std::atomic_thread_fence(std::memory_order_release);  // what was stored before comes before it
    store(file.data() + offset, sealed(number));
    file.touch(storage_);
  }
  uint64_t total() const { return checksum(word(kCursor), file.data() + kSlots, file.size() - kSlots); }
  Storage& storage_;
  bool made_ = false;
};

/// Brings a file to the disk. When a ledger is there, its cursor of before is a safe one.
inline Status sync_file(const std::string& path) {
  if (!ends_with(path, Ledger::kSuffix)) return sync_path(path);
  const Fd file(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  uint64_t cursor = 0;
  if (::pread(file.get(), &cursor, sizeof cursor, Ledger::kCursor) != sizeof cursor) return sync_path(path);
  if (::fsync(file.get()) != 0) return system_error("fsync", path);
  const bool noted = ::pwrite(file.get(), &cursor, sizeof cursor, Ledger::kSafe) == sizeof cursor;
  return noted ? Status() : system_error("write", path);
}

/// Segments that were emptied, for all topics to use again: their pages are warm, and to touch fresh pages is the largest
/// cost of a publish.
class Spares {
 public:
  explicit Spares(Storage& storage) : storage_(storage) {}
  /// A spare one with room for so many bytes, or null.
  std::unique_ptr<Segment> take(size_t size, bool anonymous) {
    for (size_t i = spares_.size(); i-- > 0;) {
      if (spares_[i]->file.size() < size || spares_[i]->file.anonymous() != anonymous) continue;
      auto taken = std::move(spares_[i]);
      spares_.erase(spares_.begin() + static_cast<std::ptrdiff_t>(i));
      return taken;
    }
    return nullptr;
  }
  /// Keeps a segment or removes it.
  void keep(std::unique_ptr<Segment> segment) {
    MappedFile& file = segment->file;
    const bool wanted = spares_.size() < kMost && file.size() <= kWarmSegment && file.size() >= kWarmSegment / 8;
    const std::string name = text(storage_.directory, "/", ++named_, ".spare");
    if (!wanted || !file.open().ok() || !file.rename(name, storage_).ok()) storage_.removed.add(file.remove());
    else spares_.push_back(std::move(segment));
  }
  void remove_all() {
    for (auto& segment : spares_) segment->file.remove();
    spares_.clear();
  }

 private:
  static constexpr size_t kMost = 8;  // of 8 MiB at most
  Storage& storage_;
  std::vector<std::unique_ptr<Segment>> spares_;
  uint64_t named_ = 0;
};

/// The segments of one topic, in the order of their numbers.
/// Always: at most the last one is not sealed; a segment that no channel needs any more is gone.
class Log {
 public:
  Log(Storage& storage, Spares& spares, std::string topic, bool kept)
      : storage_(storage), spares_(spares), topic_(std::move(topic)), kept_(kept && !storage.directory.empty()) {}

  std::deque<std::unique_ptr<Segment>> segments;
  bool follows = false;  // what is stored is handed to the channels at once

  uint64_t end() const { return end_; }  // number of the next message
  bool kept() const { return kept_; }    // in files
  Segment* tail() const { return segments.empty() || segments.back()->sealed ? nullptr : segments.back().get(); }

  /// The segment of a message, or the next one that there is.
  Segment* at(uint64_t number) const {
    const auto found = std::partition_point(segments.begin(), segments.end(), [&](const auto& s) { return s->end() <= number; });
    return found == segments.end() ? nullptr : found->get();
  }
  std::string path(uint64_t first) const {
    if (!kept_) return {};
    const std::string number = std::to_string(first);
    return text(storage_.directory, "/", topic_, ".", std::string(20 - number.size(), '0'), number, ".segment");
  }

  /// Stores a message, which counts from the next commit on.
  Status append(const MessageId& id, int64_t timestamp, std::string_view body, int64_t due = 0, uint16_t attempts = 1) {
    Segment* last = tail();
    if (last == nullptr || !last->has_room(body.size(), due != 0)) {
      Status status = roll(body.size());
      if (!status.ok()) return status;
      last = tail();
    }
    if (!last->file.mapped()) {
      Status status = last->file.open();
      if (!status.ok()) return status;
    }
    last->append(id, timestamp, body, due, attempts);
    ++end_;
    return {};
  }
  void commit() { if (Segment* last = tail()) last->commit(storage_); }
  /// Forgets the messages from `number` on.
  Status truncate(uint64_t number) {
    Segment* last = at(number);
    if (last == nullptr || last->first > number) return {};
    Status status = last->file.open();
    if (!status.ok()) return status;
    while (segments.back().get() != last) release(*segments.back());
    last->truncate(static_cast<uint32_t>(number - last->first), storage_);
    end_ = number;
    return status;
  }
  /// Takes a segment that is not needed any more out of the log.
  void release(const Segment& segment) {
    const auto found = std::find_if(segments.begin(), segments.end(), [&](const auto& s) { return s.get() == &segment; });
    auto released = std::move(*found);
    segments.erase(found);
    spares_.keep(std::move(released));
  }
  void remove_all() {
    for (auto& segment : segments) storage_.removed.add(segment->file.remove());
    segments.clear();
  }
  void adopt(std::unique_ptr<Segment> segment) {
    end_ = segment->end();
    segments.push_back(std::move(segment));
  }
  /// What is stored next has this number at the least.
  void skip_to(uint64_t number) {
    if (number <= end_) return;
    end_ = number;
    if (Segment* last = tail()) last->sealed = true;
  }

 private:
  /// Ends the last segment and begins one that has room for a message of that size.
  Status roll(size_t body) {
    commit();
    const size_t needed = Segment::kFrames + 8 + Segment::kFrameHead + body + 8;
    if (needed > kLargestSegment) return {"the message is too large for a segment"};
    const size_t wanted = std::max(next_size(), (needed + kPageSize - 1) / kPageSize * kPageSize);
    std::unique_ptr<Segment> next = wanted <= kWarmSegment ? spares_.take(wanted, !kept_) : nullptr;
    Status status;
    if (next == nullptr) {
      next = std::make_unique<Segment>(path(end_), wanted, end_);
      status = next->file.create(storage_);
      if (!status.ok()) {  // the spare ones hold space, too, and those that nobody has closed yet
        spares_.remove_all();
        storage_.removed.close();
        status = next->file.create(storage_);
      }
    } else {
      next->begin(end_, follows);
      status = next->file.rename(path(end_), storage_);
    }
    storage_.full = status.error;
    if (!status.ok()) return next->file.remove(), status;
    next->begin(end_, follows);
    if (Segment* last = tail()) last->sealed = true;
    segments.push_back(std::move(next));
    return {};
  }
  /// Four times the last one, while there is a backlog; small enough to stay in the caches while the consumers keep up.
  size_t next_size() const {
    if (segments.empty()) return std::min(kFirstSegment, storage_.largest_segment);
    const size_t grown = segments.back()->file.size() * 4;
    return std::min(segments.size() > kFewSegments ? grown : std::min(grown, kWarmSegment), storage_.largest_segment);
  }
  Storage& storage_;
  Spares& spares_;
  std::string topic_;
  bool kept_;
  uint64_t end_ = 0;
};

// ---------------------------------------------------------------------------------------------------------------------
// [7] Topics and channels
//
// The queue itself. A topic is a log; a channel is a cursor in it plus the messages that are out of order: in flight,
// requeued, deferred. No sockets and no clock: time is Broker::now, and what goes to a consumer is appended to its Port.
// Always: to a channel, each message of its log below `distributed` is exactly one of: waiting (at or above the cursor and
// in no gap), held (in a slot: in flight, requeued or deferred), or finished.
// ---------------------------------------------------------------------------------------------------------------------

/// Bytes that wait to be written: our own, and runs of frames that lie in a segment and are sent from there.
/// Always: mapped runs live for one turn only; settle() copies what the write of that turn left over.
class Output {
 public:
  size_t size() const { return bytes_.size() + mapped_; }
  bool empty() const { return size() == 0; }
  void append(std::string_view bytes) { bytes_ += bytes; }
  void append_frame(uint32_t type, std::string_view data) {
    std::array<char, 8> head;
    put_be(&head[0], static_cast<uint32_t>(data.size() + 4));
    put_be(&head[4], type);
    bytes_.append(head.data(), head.size());
    bytes_ += data;
  }
  void append_mapped(const char* data, size_t size) {
    static constexpr size_t kWorthMapping = 512;  // bytes; a shorter run costs less to copy than to name
    if (size < kWorthMapping) return append({data, size});
    runs_.push_back({bytes_.size(), data, size});
    mapped_ += size;
  }
  /// The bytes in order, for writev; at most `most` pieces.
  size_t gather(iovec* pieces, size_t most) const {
    size_t count = 0, at = 0;
    auto add = [&](const char* data, size_t size) {
      if (size > 0 && count < most) pieces[count++] = {const_cast<char*>(data), size};
    };
    for (const Run& run : runs_) {
      add(bytes_.data() + at, run.at - at);
      add(run.data, run.size);
      at = run.at;
    }
    add(bytes_.data() + at, bytes_.size() - at);
    return count;
  }
  /// Takes away the first `done` bytes and copies what remains.
  void settle(size_t done) {
    std::vector<iovec> pieces(done == size() ? 0 : 2 * runs_.size() + 1);
    pieces.resize(gather(pieces.data(), pieces.size()));
    std::string left;
    for (const iovec& piece : pieces) {
      const size_t skip = std::min(done, piece.iov_len);
      done -= skip;
      left.append(static_cast<const char*>(piece.iov_base) + skip, piece.iov_len - skip);
    }
    if (!left.empty() || bytes_.capacity() > 1024) bytes_.swap(left);  // an idle connection holds no memory
    else bytes_.clear();
    runs_.clear();
    if (runs_.capacity() > 8) runs_.shrink_to_fit();
    mapped_ = 0;
  }
  /// All bytes; nothing remains.
  std::string take() { return settle(0), std::exchange(bytes_, {}); }

 private:
  struct Run {
    size_t at;  // its place: before bytes_[at]
    const char* data;
    size_t size;
  };
  std::string bytes_;
  std::vector<Run> runs_;
  size_t mapped_ = 0;
};

/// Quantiles of the last while, within 1 % of the exact value (of the sample at that rank): counts in buckets that grow by
/// a factor of 1.01 / 0.99. Two halves of the window, so that what is older than it goes.
class LatencySketch {
 public:
  explicit LatencySketch(int64_t window) : half_window_(std::max<int64_t>(window / 2, 1)) {}
  void add(int64_t nanoseconds, int64_t now) {
    const double value = static_cast<double>(std::max<int64_t>(nanoseconds, 1));
    turn(now);
    ++halves_[0][static_cast<int>(std::ceil(std::log(value) / std::log(kGrowth)))];
  }
  /// Merges another one into this one: a topic is its channels merged.
  void merge(LatencySketch& other, int64_t now) {
    other.turn(now);
    for (const auto& half : other.halves_)
      for (const auto& [bucket, count] : half) halves_[0][bucket] += count;
  }
  LatencyStats stats(const std::vector<double>& quantiles, int64_t now) {
    if (begun_ != 0) turn(now);
    std::map<int, uint64_t> all = halves_[0];
    for (const auto& [bucket, count] : halves_[1]) all[bucket] += count;
    LatencyStats shown;
    for (const auto& [bucket, count] : all) shown.count += count;
    for (double quantile : quantiles) {
      auto left = static_cast<int64_t>(std::ceil(quantile * static_cast<double>(shown.count)));
      auto at = all.begin();
      while (at != all.end() && (left -= static_cast<int64_t>(at->second)) > 0) ++at;
      const double middle = at == all.end() ? 0 : 2 * std::pow(kGrowth, at->first) / (kGrowth + 1);
      shown.percentiles.emplace_back(quantile, static_cast<int64_t>(std::min(middle, 9e18)));  // what an int64_t takes
    }
    return shown;
  }

 private:
  static constexpr double kGrowth = 1.01 / 0.99;
  void turn(int64_t now) {
    if (begun_ == 0) begun_ = now;
    if (now - begun_ < half_window_) return;
    halves_[1] = now - begun_ < 2 * half_window_ ? std::move(halves_[0]) : std::map<int, uint64_t>();
    halves_[0].clear();
    begun_ = now;
  }
  int64_t half_window_, begun_ = 0;  // begun_: when the first half began
  std::array<std::map<int, uint64_t>, 2> halves_;
};

struct Consumer;
class Session;
class Topic;
class Channel;

inline constexpr uint32_t kNoSlot = 0xFFFFFFFF;  // no slot

/// What a session writes to. `attend` tells the loop that there is something to do here before the turn ends.
struct Port {
  Output out;
  bool closing = false;          // close when everything is written
  bool dropped = false;          // close at once
  Consumer* consumer = nullptr;  // the subscription, null again when its channel has gone
  Session* session = nullptr;    // whose it is
  std::function<void()> attend = [] {};
};

/// One subscription of a channel.
/// Always: in_flight is the number of Held that it owns; it is in its channel's ready list whenever it can take a message.
struct Consumer {
  static constexpr size_t kMostOutput = size_t{1} << 20;  // bytes not yet written, above which it gets no more
  enum Distance { kSameZone, kSameRegion, kElsewhere };   // elsewhere, unless consumption is topology-aware

  Channel& channel;
  Port* port;
  Distance distance;
  int64_t msg_timeout;  // nanoseconds
  int sample_rate;      // percent; 0: everything
  int64_t rdy = 0, in_flight = 0;
  uint64_t delivered = 0, finished = 0, requeued = 0;
  bool listed = false;  // in the channel's ready list
  uint32_t expected = kNoSlot, latest = kNoSlot;  // the slots that it will likely finish next, and that it got last

  bool can_take() const { return in_flight < rdy && port->out.size() < kMostOutput && !port->closing; }
  void count_in(ClientStats& of) const {
    of.ready_count = rdy;
    of.in_flight_count = in_flight;
    of.message_count = static_cast<int64_t>(delivered);
    of.finish_count = static_cast<int64_t>(finished);
    of.requeue_count = static_cast<int64_t>(requeued);
  }
};

/// A message that is out of order, in the slot of the ledger of the same index.
struct Held {
  MessageId id;      // while it is in flight
  bool in_flight;
  uint32_t next;     // likely that of what the same consumer got after it
  Segment* segment;
  Consumer* owner;   // whom it is in flight with; null when that has left
  int64_t delivered_at;
  int64_t due;       // monotonic: its deadline in flight, or the end of its delay; kNever: requeued, or a gap
};

/// The slots of one channel. They are taken in a circle, so messages that go out together lie together, and who finishes in
/// the order of delivery finds each at the place where it is expected. For who does not, there is an index of the ids in
/// flight, a table of open addressing, from the first time that it is needed until nothing is in flight.
/// Always: a quarter of the slots is kept free, so a round passes three used ones at most for each that it takes; the index
/// is at most half full.
class HeldMessages {
 public:
  explicit HeldMessages(Ledger& ledger) : ledger_(ledger) {}
  Held& operator[](uint32_t slot) { return pool_[slot]; }
  uint32_t end() const { return static_cast<uint32_t>(pool_.size()); }
  size_t used() const { return used_; }
  size_t in_flight() const { return in_flight_; }

  /// Makes room for more; says for how many there is room, fewer where the disk is full.
  size_t reserve(size_t more) {
    while (used_ + more > most() && grow()) continue;
    return std::min(more, most() - std::min(most(), used_));
  }
  /// Takes a free slot, which is then to be filled; there must be room.
  uint32_t take() {
    while (ledger_.used(next_)) advance();
    const uint32_t slot = next_;
    advance();
    return take(slot);
  }
  /// Likewise this one; after a restart, where an earlier process has filled it.
  uint32_t take(uint32_t slot) {
    if (slot >= pool_.size()) pool_.resize(std::min<size_t>(2 * size_t{slot} + 8, ledger_.slots()));
    ++used_;
    return slot;
  }
  void free(uint32_t slot) {
    ledger_.free(slot);
    pool_[slot].due = kNever;
    if (--used_ == 0) next_ = 0;  // a small part of it stays warm
  }
  /// A channel that holds nothing needs no space for it.
  void shrink() {
    ledger_.file.shrink(kPageSize);
    pool_ = std::vector<Held>();  // = {} would keep the capacity
    index_ = std::vector<Entry>();
    next_ = 0;
  }

  uint32_t find(const Consumer& consumer, const MessageId& id) {
    const uint32_t guess = consumer.expected;
    if (guess < pool_.size() && pool_[guess].in_flight && pool_[guess].id == id) return guess;
    if (index_.empty()) make_index();
    const auto hash = static_cast<uint32_t>(id.hash());
    for (size_t at = hash & mask();; at = (at + 1) & mask())
      if (index_[at].slot == kNoSlot || (index_[at].hash == hash && pool_[index_[at].slot].id == id)) return index_[at].slot;
  }
  void enter(uint32_t slot, const MessageId& id, Consumer& owner) {
    Held& held = pool_[slot];
    held.id = id;
    held.in_flight = true;
    held.owner = &owner;
    held.next = kNoSlot;
    if (owner.in_flight == 0 || owner.expected == kNoSlot) owner.expected = slot;
    else pool_[owner.latest].next = slot;
    owner.latest = slot;
    ++owner.in_flight;
    ++in_flight_;
    if (index_.empty()) return;
    if (in_flight_ * 2 > index_.size()) make_index();
    else place(slot);
  }
  void leave(uint32_t slot) {
    Held& held = pool_[slot];
    held.in_flight = false;
    held.due = kNever;
    --in_flight_;
    if (Consumer* const owner = std::exchange(held.owner, nullptr)) {
      owner->expected = held.next;
      --owner->in_flight;
    }
    if (!index_.empty()) take_out(slot);
    if (in_flight_ == 0 && pool_.size() <= index_.size()) index_.clear();  // and not where it would take long to make anew
  }

 private:
  struct Entry {
    uint32_t hash, slot = kNoSlot;  // hash: of the id; its low bits tell where a search begins
  };
  size_t most() const { return pool_.size() * 3 / 4; }  // so many may be used
  void advance() { next_ = next_ + 1 < pool_.size() ? next_ + 1 : 0; }
  bool grow() {
    if (pool_.size() == ledger_.slots() && !ledger_.grow().ok()) return false;
    next_ = end();
    pool_.resize(std::min<size_t>(std::max<size_t>(8, pool_.size() * 2), ledger_.slots()));
    return true;
  }

  size_t mask() const { return index_.size() - 1; }
  void make_index() {
    size_t size = 64;
    while (size < 4 * in_flight_) size *= 2;
    index_.assign(size, Entry{});
    for (uint32_t slot = 0; slot < end(); ++slot)
      if (pool_[slot].in_flight) place(slot);
  }
  void place(uint32_t slot) {
    const auto hash = static_cast<uint32_t>(pool_[slot].id.hash());
    size_t at = hash & mask();
    while (index_[at].slot != kNoSlot) at = (at + 1) & mask();
    index_[at] = {hash, slot};
  }
  void take_out(uint32_t slot) {
    size_t gap = pool_[slot].id.hash() & mask();
    while (index_[gap].slot != slot) gap = (gap + 1) & mask();
    for (size_t at = (gap + 1) & mask(); index_[at].slot != kNoSlot; at = (at + 1) & mask()) {
      if (((at - index_[at].hash) & mask()) < ((at - gap) & mask())) continue;
      index_[gap] = index_[at];  // the gap is closed, so that no search ends in it
      gap = at;
    }
    index_[gap].slot = kNoSlot;
  }
  Ledger& ledger_;
  std::vector<Held> pool_;
  std::vector<Entry> index_;
  uint32_t next_ = 0;  // where a free slot is looked for
  size_t used_ = 0, in_flight_ = 0;
};

inline bool topology_aware(const Options& options) {
  const auto& experiments = options.enable_experiment;
  return std::find(experiments.begin(), experiments.end(), "topology-aware-consumption") != experiments.end();
}

template <typename Map>
auto* find_in(const Map& map, std::string_view name) {
  const auto found = map.find(name);
  return found == map.end() ? nullptr : found->second.get();
}

/// All topics, and what they share.
class Broker {
 public:
  Broker(const Options& opts, Logger& log, const std::string& directory) : options(opts), logger(log), ids(opts.node_id) {
    storage.directory = directory;
    const auto most = std::clamp<int64_t>(opts.max_bytes_per_file, kPageSize, kLargestSegment);
    storage.largest_segment = static_cast<size_t>(most) / kPageSize * kPageSize;
  }

  const Options& options;
  Logger& logger;
  Now now;  // the time of this turn, set by the loop
  Timers timers;
  Storage storage;
  Spares spares{storage};
  IdSource ids;
  std::map<std::string, std::unique_ptr<Topic>, std::less<>> topics;
  uint64_t deletions = 0;         // of topics: what a session remembers of one holds until this rises
  bool serving = true;            // false: nothing is delivered any more
  bool metadata_changed = false;  // nsqd.dat is behind
  bool metadata_awaited = false;  // and somebody waits for it
  /// Told of each topic (channel null) and channel that comes or goes.
  std::function<void(const Topic& topic, const Channel* channel, bool created)> on_change;

  Topic* find(std::string_view name) const { return find_in(topics, name); }
  Topic& topic(std::string_view name);  // made where it is missing
  void delete_topic(Topic& topic);
  void changed(const Topic& topic, const Channel* channel, bool created);
  void touch(Topic& topic);       // it may have something to deliver
  void cool_later(Topic& topic);  // it may have something mapped that is not used any more
  bool has_work() const { return !touched_.empty(); }
  void pump();         // delivers what this turn made deliverable
  void after_write();  // unmaps what is not used any more
  Metadata metadata() const;
  void close();

 private:
  std::vector<Topic*> touched_, cooling_;
};

/// A topic. Messages below `distributed` were handed to its channels; the mark follows the end of the log unless the topic
/// is paused, waits for nsqlookupd, or has no channel.
class Topic {
 public:
  Topic(Broker& of, std::string topic_name)
      : broker(of), name(std::move(topic_name)), ephemeral(is_ephemeral(name)), log(of.storage, of.spares, name, !ephemeral) {}

  Broker& broker;
  const std::string name;
  const bool ephemeral;
  Log log;
  std::map<std::string, std::unique_ptr<Channel>, std::less<>> channels;
  uint64_t message_count = 0, message_bytes = 0;
  bool paused = false;
  bool deferred = false;                  // a message with a delay was stored since the last pump
  bool held_back = false;                 // until nsqlookupd has said which channels there are
  bool touched = false, cooling = false;  // in the broker's lists
  std::vector<Channel*> hungry;           // those with a consumer that could take a message when last looked at
  std::vector<Channel*> bounded;          // those in memory only

  uint64_t distributed() const { return distributed_; }
  bool flows() const { return !paused && !held_back && !channels.empty(); }
  int64_t depth() const { return static_cast<int64_t>(log.end() - distributed_); }
  int64_t backend_depth() const { return unmapped(distributed_, log.end()); }
  int64_t unmapped(uint64_t begin, uint64_t end) const;  // messages of [begin, end) in segments that are not mapped

  /// Stores the bodies, in order; those before the one that fails stay. `delay` in nanoseconds, for all of them.
  Status publish(const std::string_view* bodies, size_t count, int64_t delay);
  Channel* find(std::string_view channel) const { return find_in(channels, channel); }
  Channel* channel(std::string_view channel, Status& status);  // made where it is missing; null when its file cannot be
  void delete_channel(Channel& channel);
  void empty();
  void pause(bool pause);
  void hold_back(bool hold);
  void close(bool remove_files);

  void pump();
  void cool();
  void release_if_done(Segment& segment);
  void release_done();
  void retire_drained_tail();
  void resume();
  void hand_over_all();
  void update_flow();  // to be called when flows() may have changed

 private:
  void mark_segments();
  void distribute();
  uint64_t distributed_ = 0;
};

/// See the head of this section for what always holds.
class Channel {
 public:
  Channel(Topic& of, std::string channel_name)
      : topic(of), name(std::move(channel_name)), ephemeral(is_ephemeral(name)), bounded(ephemeral || !of.log.kept()),
        broker_(of.broker),
        ledger_(bounded ? "" : text(broker_.storage.directory, "/", of.name, ":", name, Ledger::kSuffix), broker_.storage),
        held_(ledger_), timer_(broker_.timers, [this] { on_time(); }), near_first_(topology_aware(broker_.options)) {
    if (!broker_.options.e2e_processing_latency_percentile.empty())
      latency = std::make_unique<LatencySketch>(broker_.options.e2e_processing_latency_window_time.count());
    if (bounded) of.bounded.push_back(this);
  }

  Topic& topic;
  const std::string name;
  const bool ephemeral;
  const bool bounded;   // in memory only, so it forgets what is above --mem-queue-size
  bool paused = false;
  bool listed = false;  // among its topic's hungry ones
  std::vector<std::unique_ptr<Consumer>> consumers;  // with a client
  uint64_t requeue_count = 0, timeout_count = 0;
  std::array<uint64_t, 3> sent_to{};  // messages, by Consumer::Distance
  std::unique_ptr<LatencySketch> latency;

  // ---- for the statistics ----------------------------------------------------------------------------------------------

  int64_t depth() const { return queued() - deferred_ahead(); }
  int64_t backend_depth() const { return std::min(topic.unmapped(cursor_, topic.distributed()), depth()); }
  int64_t in_flight_count() const { return static_cast<int64_t>(held_.in_flight()); }
  int64_t deferred_count() const { return deferred_ + deferred_ahead(); }
  uint64_t message_count() const { return topic.distributed() - counted_from_; }
  uint64_t cursor() const { return cursor_; }
  /// Messages above the cursor that are not due yet. Linear in the segments that have messages with a delay.
  int64_t deferred_ahead() const {
    int64_t count = 0;
    for (const auto& segment : topic.log.segments) {
      if (segment->deferred_records == 0 || segment->end() <= cursor_ || !segment->file.open().ok()) continue;
      broker_.cool_later(topic);
      const uint64_t end = std::min(segment->end(), topic.distributed());
      for (uint64_t number = std::max(cursor_, segment->first); number < end; ++number) {
        const auto i = static_cast<uint32_t>(number - segment->first);
        if (segment->deferred(i) && segment->due_of(i) > broker_.now.wall) ++count;
      }
    }
    return count;
  }

  // ---- for the sessions: finish, requeue and touch return why they failed, or nothing ----------------------------------

  Consumer& subscribe(Port& port, Consumer::Distance distance, Duration msg_timeout, int sample_rate = 0) {
    consumers.emplace_back(new Consumer{*this, &port, distance, msg_timeout.count(), sample_rate});
    return *(port.consumer = consumers.back().get());
  }

  /// Its messages stay in flight until they time out, as with nsqd, unless they are given back: then they are requeued at
  /// once. The last consumer takes an ephemeral channel with it. Linear in the messages that are held.
  void unsubscribe(Consumer& consumer, bool give_back = false) {
    for (uint32_t slot = 0; slot < held_.end() && consumer.in_flight > 0; ++slot) {
      if (held_[slot].owner != &consumer) continue;
      if (give_back) held_.leave(slot), put_back(slot);
      else --std::exchange(held_[slot].owner, nullptr)->in_flight;
    }
    ready_.erase(std::remove(ready_.begin(), ready_.end(), &consumer), ready_.end());
    consumer.port->consumer = nullptr;
    consumers.erase(std::find_if(consumers.begin(), consumers.end(), [&](const auto& c) { return c.get() == &consumer; }));
    if (ephemeral && consumers.empty()) topic.delete_channel(*this);
  }

  void set_ready(Consumer& consumer, int64_t rdy) {
    consumer.rdy = rdy;
    consider(consumer);
  }
  /// Something has changed for this consumer: it may be able to take messages now.
  void consider(Consumer& consumer) {
    if (!consumer.listed && consumer.can_take()) {
      consumer.listed = true;
      ready_.push_back(&consumer);
    }
    if (!listed && hungry()) {
      listed = true;
      topic.hungry.push_back(this);
    }
    if (consumer.listed) broker_.touch(topic);
  }

  std::string_view finish(Consumer& consumer, const MessageId& id) {
    std::string_view why;
    const uint32_t slot = owned(consumer, id, why);
    if (slot == kNoSlot) return why;
    Segment& segment = *held_[slot].segment;
    ++consumer.finished;
    if (latency != nullptr && segment.file.open().ok()) {
      const int64_t published = Segment::timestamp_of(segment.frame_of(ledger_.number(slot)));
      latency->add(published > 0 ? broker_.now.wall - published : 0, broker_.now.steady);
    }
    held_.leave(slot);
    finish(slot);
    consider(consumer);
    return {};
  }
  std::string_view requeue(Consumer& consumer, const MessageId& id, int64_t delay) {
    std::string_view why;
    const uint32_t slot = owned(consumer, id, why);
    if (slot == kNoSlot) return why;
    held_.leave(slot);
    ++consumer.requeued;
    ++requeue_count;
    if (delay == 0) put_back(slot);
    else put_off(slot, saturating_add(broker_.now.wall, delay));
    consider(consumer);
    return {};
  }
  std::string_view touch(Consumer& consumer, const MessageId& id, int64_t msg_timeout) {
    std::string_view why;
    const uint32_t slot = owned(consumer, id, why);
    if (slot == kNoSlot) return why;
    const int64_t latest = saturating_add(held_[slot].delivered_at, broker_.options.max_msg_timeout.count());
    wait(slot, std::min(saturating_add(broker_.now.steady, msg_timeout), latest));
    return {};
  }

  void pause(bool pause) {
    paused = pause;
    broker_.metadata_changed = broker_.metadata_awaited = true;
    broker_.touch(topic);
  }

  /// Everything that the channel was given counts as finished from here on.
  void empty() {
    leave();
    if (awake()) move_cursor(topic.distributed());
    drop_held();
    topic.release_done();
    for (auto& consumer : consumers) consider(*consumer);
  }

  /// Closes its clients, and removes what it stored where that is wanted.
  void close(bool remove_files) {
    broker_.logger.say(Level::kInfo, "CHANNEL(", name, "): ", remove_files ? "deleting" : "closing");
    for (auto* list : {&topic.hungry, &topic.bounded}) list->erase(std::remove(list->begin(), list->end(), this), list->end());
    for (auto& consumer : consumers) {
      consumer->port->consumer = nullptr;
      consumer->port->dropped = true;
      consumer->port->attend();
    }
    ready_.clear();
    if (!remove_files) return ledger_.close_for_good();
    if (at_ != nullptr) --std::exchange(at_, nullptr)->readers;
    if (awake()) drop_held();
    ledger_.file.remove();
  }

  // ---- for the topic ---------------------------------------------------------------------------------------------------

  bool hungry() const { return !ready_.empty(); }

  /// Gives out what waits, for as long as a consumer can take it: in rounds, with an even share for each that is ready.
  void pump() {
    static constexpr int64_t kLongestRun = 512;  // messages; long enough to be cheap, short enough to be fair
    int64_t share = 0;  // of this round, which has `left` turns to go
    for (size_t left = 0; broker_.serving && !paused && !ready_.empty(); --left) {
      if (left == 0) {
        left = ready_.size();
        share = std::clamp<int64_t>((queued() - 1) / static_cast<int64_t>(left) + 1, 1, kLongestRun);
      }
      if (near_first_) bring_near_one_forward();
      Consumer& consumer = *ready_.front();
      if (consumer.can_take() && deliver(consumer, static_cast<size_t>(share)) == 0) return;
      ready_.pop_front();
      consumer.listed = consumer.can_take();
      if (consumer.listed) ready_.push_back(&consumer);
    }
  }

  /// Maps the ledger; false where that cannot be done now.
  bool awake() {
    const Status status = ledger_.open(cursor_);
    if (!status.ok()) broker_.logger.say(Level::kError, "CHANNEL(", name, "): cannot be used now - ", status.error);
    return status.ok();
  }
  /// Deferred messages that are next begin to wait, consumer or not.
  void pass_deferred() { if (awake()) find_waiting(); }

  /// Drops the newest messages above the bound, behind what the ready consumers took.
  void trim() {
    int64_t excess = queued() - broker_.options.mem_queue_size;
    for (uint64_t end = topic.distributed(); excess > 0 && end > cursor_;) {
      const auto next = gaps_.lower_bound(end);  // the gap before `end`, or at it, is the one before this
      const uint64_t begin = next == gaps_.begin() ? cursor_ : std::max(cursor_, std::prev(next)->second.end);
      const uint64_t dropped = std::min(end - std::min(begin, end), static_cast<uint64_t>(excess));
      add_gap(end - dropped, end);
      excess -= static_cast<int64_t>(dropped);
      end = next == gaps_.begin() ? cursor_ : std::prev(next)->first;
    }
    if (excess == 0) topic.release_done();
  }

  /// Whether there is, or will be, something for this channel in a segment, or above its beginning.
  bool needs(const Segment& segment) const {
    const uint64_t from = std::max(cursor_, segment.first);
    const auto next = gaps_.upper_bound(from);
    return from < segment.end() && (next == gaps_.begin() || std::prev(next)->second.end < segment.end());
  }
  /// The segment goes.
  void forget(const Segment& segment) { if (at_ == &segment) at_ = nullptr; }

  /// Messages [from, to), the newest ones, are not for this channel.
  void skip(uint64_t from, uint64_t to) {
    counted_from_ += to - from;
    if (!awake()) return;
    if (cursor_ == from) return move_cursor(to);
    add_gap(from, to);
    if (held_.reserve(1) == 0) return;
    gaps_[from].slot = held_.take();
    ledger_.fill(gaps_[from].slot, from, static_cast<int64_t>(to), 0, Ledger::kGap);
  }

  /// Gives back the memory of a ledger that is not looked at now.
  void cool() { if (held_.used() == 0 && at_ == nullptr) ledger_.file.close(); }

  /// Where there is no message yet, there is nothing to remember, and no file.
  Status create(uint64_t cursor) {
    cursor_ = counted_from_ = cursor;
    return cursor > 0 || topic.log.end() > 0 ? ledger_.create(cursor) : Status();
  }
  /// Opens the ledger of an earlier process; where it is damaged or missing, all that is stored is delivered again.
  void recover() {
    if (const auto cursor = ledger_.recover()) return void(cursor_ = *cursor);
    throw_unless(create(0));
    if (!topic.log.segments.empty())
      broker_.logger.say(Level::kWarning, "LOG: ", ledger_.file.path(), " is missing or damaged; all that is stored comes again");
  }
  /// Takes up its place after a restart: what was delivered before and not finished comes first, with its attempts; what was
  /// put off waits for its time; the cursor is at the first message never delivered.
  void resume() {
    const auto& segments = topic.log.segments;
    counted_from_ = topic.distributed();
    const uint64_t lowest = segments.empty() ? topic.log.end() : segments.front()->first;
    if (cursor_ < lowest) move_cursor(lowest);
    for (uint32_t i = 0; ledger_.file.mapped() && i < ledger_.slots(); ++i)
      if (ledger_.used(i)) take_up(i);
    const auto earlier = [this](const auto& a, const auto& b) { return ledger_.number(a.slot) < ledger_.number(b.slot); };
    std::sort(requeued_.begin(), requeued_.end(), earlier);
    uint64_t expected = cursor_;
    for (const auto& segment : segments) {
      add_gap(expected, std::max(expected, segment->first));
      expected = std::max(expected, segment->end());
      for (uint32_t i : segment->damaged)
        if (segment->first + i >= cursor_) add_gap(segment->first + i, segment->first + i + 1);
    }
    add_gap(expected, std::max(expected, topic.distributed()));
  }
  /// A message of an nsqd that had delivered it before.
  void take_over(uint64_t number, uint16_t attempts) {
    if (attempts == 0 || !awake() || held_.reserve(1) == 0) return;
    requeued_.push_back({hold(*topic.log.at(number), number, 0, attempts), topic.distributed()});
    add_gap(number, number + 1);
  }

 private:
  struct Gap {
    uint64_t end;
    uint32_t slot = kNoSlot;  // that keeps it over a restart, where nothing else does
  };
  struct Requeued {
    uint32_t slot;
    uint64_t behind;  // goes out when the cursor has passed this number: its turn in the queue
  };
  struct Due {
    int64_t at;  // monotonic
    uint32_t begin, end;  // slots
    bool operator<(const Due& other) const { return at > other.at; }  // the heap's top is the earliest
  };

  /// Messages that wait, with those above the cursor that are not due yet.
  int64_t queued() const { return static_cast<int64_t>(topic.distributed() - cursor_ - gapped_ + requeued_.size()); }

  // ---- the cursor ------------------------------------------------------------------------------------------------------

  void move_cursor(uint64_t to) {
    cursor_ = to;
    ledger_.set_cursor(to);
    while (!gaps_.empty() && gaps_.begin()->first < cursor_) {
      const auto [begin, gap] = *gaps_.begin();
      gaps_.erase(gaps_.begin());
      gapped_ -= gap.end - begin;
      if (gap.slot != kNoSlot) held_.free(gap.slot);
    }
  }
  bool in_gap(uint64_t number) const {
    const auto next = gaps_.upper_bound(number);
    return next != gaps_.begin() && std::prev(next)->second.end > number;
  }
  /// Makes gaps of the part of [begin, end) that is in none yet; in memory they are joined, since a slot needs its own there.
  void add_gap(uint64_t begin, uint64_t end) {
    while (begin < end) {
      const auto next = gaps_.upper_bound(begin);
      const auto before = next == gaps_.begin() ? gaps_.end() : std::prev(next);
      const uint64_t until = next == gaps_.end() ? end : std::min(end, next->first);
      if (before != gaps_.end() && before->second.end > begin) {
        begin = before->second.end;
        continue;
      }
      gapped_ += until - begin;
      if (bounded && before != gaps_.end() && before->second.end == begin) before->second.end = until;
      else gaps_.emplace(begin, Gap{until});
      begin = until;
    }
  }

  /// Moves the cursor to the next message that waits; false when there is none, or when it cannot be read now. What was
  /// published with a delay and is not due yet is put off on the way.
  bool find_waiting() {
    for (;;) {
      while (!gaps_.empty() && gaps_.begin()->first == cursor_) move_cursor(gaps_.begin()->second.end);
      if (cursor_ >= topic.distributed()) return false;
      if (at_ == nullptr || cursor_ >= at_->end()) {
        enter_next();
        continue;
      }
      const Status status = at_->file.open();
      if (!status.ok()) broker_.logger.say(Level::kError, "CHANNEL(", name, "): cannot read - ", status.error);
      if (!status.ok()) return false;
      const auto i = static_cast<uint32_t>(cursor_ - at_->first);
      const int64_t due = at_->deferred(i) ? at_->due_of(i) : 0;
      if (held_.reserve(1) == 0) return false;
      if (due <= broker_.now.wall) return true;
      put_off(hold(*at_, cursor_, due, 0), due);
      move_cursor(cursor_ + 1);
    }
  }
  /// Takes the cursor into its segment. There is one: what is above the cursor and in no gap is stored.
  void enter_next() {
    leave();
    at_ = topic.log.at(cursor_);
    ++at_->readers;
  }
  void leave() {
    if (at_ == nullptr) return;
    Segment& left = *std::exchange(at_, nullptr);
    --left.readers;
    broker_.cool_later(topic);
    topic.release_if_done(left);
  }

  // ---- held messages ---------------------------------------------------------------------------------------------------

  /// Puts a message into a slot; there must be room.
  uint32_t hold(Segment& segment, uint64_t number, int64_t due_wall, uint16_t attempts) {
    const uint32_t slot = held_.take();
    ledger_.fill(slot, number, due_wall, attempts, Ledger::kHeld);
    note_held(slot, segment);
    return slot;
  }
  void note_held(uint32_t slot, Segment& segment) {
    ++segment.held;
    held_[slot].segment = &segment;
    held_[slot].due = kNever;
  }
  /// A message that an earlier process held, or a gap that it noted.
  void take_up(uint32_t slot) {
    const uint64_t number = ledger_.number(slot);
    held_.take(slot);
    if (ledger_.kind(slot) == Ledger::kGap) {
      const uint64_t end = std::min(static_cast<uint64_t>(ledger_.due(slot)), topic.distributed());  // later ones are for it
      if (number < cursor_ || end <= number || in_gap(number)) return held_.free(slot);
      ledger_.set_due(slot, static_cast<int64_t>(end));
      add_gap(number, end);
      gaps_[number].slot = slot;
      return;
    }
    Segment* segment = topic.log.at(number);
    const auto broken = segment == nullptr ? std::vector<uint32_t>() : segment->damaged;
    const bool there = segment != nullptr && segment->first <= number && number < topic.distributed();
    if (!there || std::find(broken.begin(), broken.end(), number - segment->first) != broken.end()) return held_.free(slot);
    note_held(slot, *segment);
    if (number >= cursor_) add_gap(number, number + 1);
    if (ledger_.due(slot) > broker_.now.wall) put_off(slot, ledger_.due(slot));
    else requeued_.push_back({slot, 0});
  }
  void finish(uint32_t slot) {
    Segment& segment = *held_[slot].segment;
    ++broker_.storage.operations;
    --segment.held;
    held_.free(slot);
    if (segment.held > 0 || cursor_ < segment.end()) return;
    if (segment.sealed) topic.release_if_done(segment);
    else if (segment.file.size() > kWarmSegment) topic.retire_drained_tail();
  }
  void drop_held() {
    for (uint32_t slot = 0; slot < ledger_.slots() && held_.used() > 0; ++slot) {
      if (!ledger_.used(slot)) continue;
      if (ledger_.kind(slot) == Ledger::kHeld) --held_[slot].segment->held;
      if (held_[slot].in_flight) held_.leave(slot);
      held_.free(slot);
    }
    requeued_.clear();
    due_.clear();
    gaps_.clear();
    gapped_ = deferred_ = 0;
  }

  uint32_t owned(Consumer& consumer, const MessageId& id, std::string_view& why) {
    const uint32_t slot = held_.find(consumer, id);
    if (slot == kNoSlot) why = "ID not in flight";
    else if (held_[slot].owner != &consumer) why = "client does not own message";
    return why.empty() ? slot : kNoSlot;
  }
  void deliver_to(Consumer& consumer, uint32_t slot, const char* frame) {
    held_.enter(slot, Segment::id_of(frame), consumer);
    held_[slot].delivered_at = broker_.now.steady;
    wait(slot, saturating_add(broker_.now.steady, consumer.msg_timeout));
    ++consumer.delivered;
  }
  /// Behind everything that waits, as nsqd does it.
  void put_back(uint32_t slot) {
    requeued_.push_back({slot, topic.distributed()});
    broker_.touch(topic);
  }
  void put_off(uint32_t slot, int64_t due_wall) {
    ledger_.set_due(slot, due_wall);
    ++deferred_;
    wait(slot, steady(due_wall));
  }
  /// Notes when something has to be done with a held message; a run of them shares a note. What was noted before stays in
  /// the heap and is passed over when its time comes, or when there is more of that than of what counts.
  void wait(uint32_t slot, int64_t due) {
    if (held_[slot].due == due) return;  // noted already
    held_[slot].due = due;
    if (!due_.empty() && due_.back().at == due && due_.back().end == slot) return void(++due_.back().end);
    if (due_.size() > 2 * held_.used() + 64) drop_old_notes();
    due_.push_back({due, slot, slot + 1});
    std::push_heap(due_.begin(), due_.end());
    timer_.set(std::min(timer_.due(), due));
  }
  void drop_old_notes() {
    for (Due& note : due_)
      while (note.begin < note.end && held_[note.begin].due != note.at) ++note.begin;
    due_.erase(std::remove_if(due_.begin(), due_.end(), [](auto& note) { return note.begin == note.end; }), due_.end());
    std::make_heap(due_.begin(), due_.end());
  }
  void on_time() {
    for (; !due_.empty() && due_.front().at <= broker_.now.steady; due_.pop_back()) {
      std::pop_heap(due_.begin(), due_.end());
      const Due due = due_.back();
      for (uint32_t slot = due.begin; slot < due.end; ++slot)
        if (held_[slot].due == due.at) time_is_up(slot);
    }
    if (!due_.empty()) timer_.set(due_.front().at);
    if (due_.empty() && held_.used() == 0) held_.shrink(), due_.shrink_to_fit();
  }
  void time_is_up(uint32_t slot) {
    Consumer* const owner = held_[slot].owner;
    if (held_[slot].in_flight) ++timeout_count, held_.leave(slot);
    else --deferred_, held_[slot].due = kNever;
    put_back(slot);
    if (owner != nullptr) consider(*owner);
  }
  /// The monotonic time of a due time by the wall clock, within the bounds that a delay has.
  int64_t steady(int64_t due_wall) const {
    const int64_t most = broker_.options.max_req_timeout.count();
    return saturating_add(broker_.now.steady, due_wall <= broker_.now.wall ? 0 : std::min(due_wall - broker_.now.wall, most));
  }

  // ---- delivery --------------------------------------------------------------------------------------------------------

  /// With topology-aware consumption, a ready consumer in this zone comes before one in this region, and that before others.
  void bring_near_one_forward() {
    const auto far = [](const Consumer* c) { return c->can_take() ? c->distance : Consumer::kElsewhere + 1; };
    const auto nearer = [&](const Consumer* a, const Consumer* b) { return far(a) < far(b); };
    const auto nearest = std::min_element(ready_.begin(), ready_.end(), nearer);
    std::rotate(ready_.begin(), nearest, nearest + 1);
  }

  /// How many messages it took from the queue for this consumer; 0 when none waits.
  size_t deliver(Consumer& consumer, size_t most) {
    const bool any = awake() && find_waiting();
    if (any && (requeued_.empty() || requeued_.front().behind > cursor_)) {
      if (!sampled_out(consumer)) return deliver_run(consumer, consumer.sample_rate == 0 ? most : 1);
      move_cursor(cursor_ + 1);
      return 1;
    }
    if (requeued_.empty() || !awake()) return 0;
    const uint32_t slot = requeued_.front().slot;
    if (!held_[slot].segment->file.open().ok()) return 0;
    requeued_.pop_front();
    broker_.cool_later(topic);
    if (sampled_out(consumer)) finish(slot);
    else deliver_again(consumer, slot);
    return 1;
  }
  /// A copy of the frame with the number of this attempt; it stops at 65535, where nsqd would begin again at 0.
  void deliver_again(Consumer& consumer, uint32_t slot) {
    const char* frame = held_[slot].segment->frame_of(ledger_.number(slot));
    const auto attempts = static_cast<uint16_t>(std::min(ledger_.attempts(slot) + 1, 65535));
    std::string copy(frame, Segment::frame_size(frame));
    put_be(&copy[16], attempts);
    ledger_.set_attempts(slot, attempts);
    ledger_.set_due(slot, 0);
    deliver_to(consumer, slot, frame);
    consumer.port->out.append(copy);
    sent(consumer, 1);
  }
  /// First deliveries, straight from the segment: neighbours go out as one piece of memory.
  size_t deliver_run(Consumer& consumer, size_t most) {
    most = std::min(most, static_cast<size_t>(consumer.rdy - consumer.in_flight));
    uint64_t end = std::min({topic.distributed(), at_->end(), cursor_ + most});
    if (!gaps_.empty()) end = std::min(end, gaps_.begin()->first);
    if (!requeued_.empty()) end = std::min(end, requeued_.front().behind);
    end = cursor_ + held_.reserve(end - cursor_);
    const char* const run = at_->frame_of(cursor_);
    const char* frame = run;
    uint64_t number = cursor_;
    for (; number < end && static_cast<size_t>(frame - run) < Consumer::kMostOutput; ++number) {
      if (number > cursor_ && at_->deferred(static_cast<uint32_t>(number - at_->first))) break;  // its frame is not next
      const size_t size = Segment::frame_size(frame);
      __builtin_prefetch(frame + 8 * size);  // neighbours are alike: the wait for memory was a quarter of a consumer's cost
      deliver_to(consumer, hold(*at_, number, 0, 1), frame);
      frame += size;
    }
    const size_t taken = number - cursor_;
    move_cursor(number);
    consumer.port->out.append_mapped(run, static_cast<size_t>(frame - run));
    sent(consumer, taken);
    return taken;
  }
  void sent(Consumer& consumer, size_t messages) {
    consumer.port->attend();
    sent_to[consumer.distance] += messages;
  }
  /// sample_rate r passes (r + 1) % and destroys the rest, for the whole channel, as nsqd 1.3.0 does.
  bool sampled_out(const Consumer& consumer) {
    if (consumer.sample_rate == 0) return false;
    dice_ ^= dice_ << 13;  // xorshift: even enough for this
    dice_ ^= dice_ >> 17;
    dice_ ^= dice_ << 5;
    return static_cast<int>(dice_ % 100) > consumer.sample_rate;
  }

  Broker& broker_;
  uint64_t cursor_ = 0;          // number of the next message never yet delivered; the ledger has it, too
  Segment* at_ = nullptr;        // that the cursor is in, once it was looked up
  std::map<uint64_t, Gap> gaps_;  // at or above the cursor: numbers that do not wait there
  uint64_t gapped_ = 0;          // how many
  uint64_t counted_from_ = 0;    // message_count is distributed - counted_from
  Ledger ledger_;
  HeldMessages held_;
  std::deque<Requeued> requeued_;
  std::vector<Due> due_;         // a heap: the deadlines of those in flight, and the ends of delays
  int64_t deferred_ = 0;         // held messages that wait for the end of their delay
  Timer timer_;                  // for the first of them
  std::deque<Consumer*> ready_;  // those that can take a message, the one that waited longest first
  const bool near_first_;
  uint32_t dice_ = 2463534242u;
};

// ---- Topic -----------------------------------------------------------------------------------------------------------

inline Status Topic::publish(const std::string_view* bodies, size_t count, int64_t delay) {
  const Now& now = broker.now;
  const int64_t due = delay > 0 ? saturating_add(now.wall, delay) : 0;
  const Segment* const tail = log.tail();
  if (!flows() && !log.kept()) {  // in memory only and nobody to take it: what is above the bound is dropped, answered by OK
    const auto room = static_cast<size_t>(std::max<int64_t>(0, broker.options.mem_queue_size - depth()));
    for (size_t i = room; i < count; ++i) message_bytes += bodies[i].size();
    message_count += count - std::min(count, room);
    count = std::min(count, room);
  }
  Status status;
  for (size_t i = 0; i < count && status.ok(); ++i) {
    status = log.append(broker.ids.next(now.wall), now.wall, bodies[i], due);
    if (!status.ok()) break;
    ++message_count;
    message_bytes += bodies[i].size();
  }
  log.commit();
  deferred = deferred || due != 0;
  if (status.ok() && log.kept()) broker.storage.full.clear();
  if (flows()) distribute();
  if (log.tail() != tail) {
    release_done();
    broker.cool_later(*this);
  }
  return status;
}

/// Hands what was stored to the channels: nothing but a number changes.
inline void Topic::distribute() {
  const bool first = std::exchange(distributed_, log.end()) == 0 && distributed_ > 0;
  for (auto channel = channels.begin(); first && channel != channels.end(); ++channel) channel->second->awake();
  broker.touch(*this);
}

inline Channel* Topic::channel(std::string_view channel_name, Status& status) {
  if (Channel* found = find(channel_name)) return found;
  auto made = std::make_unique<Channel>(*this, std::string(channel_name));
  status = made->create(distributed_);
  if (!status.ok()) {
    broker.storage.full = status.error;
    made->close(true);
    return nullptr;
  }
  broker.logger.say(Level::kInfo, "TOPIC(", name, "): new channel(", channel_name, ")");
  Channel& channel = *channels.emplace(channel_name, std::move(made)).first->second;
  update_flow();
  broker.changed(*this, &channel, true);
  return &channel;
}

inline void Topic::delete_channel(Channel& channel) {
  broker.logger.say(Level::kInfo, "TOPIC(", name, "): deleting channel ", channel.name);
  auto gone = std::move(channels.find(channel.name)->second);
  channels.erase(channel.name);
  gone->close(true);
  update_flow();
  release_done();
  broker.changed(*this, gone.get(), false);
  gone.reset();
  if (ephemeral && channels.empty()) broker.delete_topic(*this);
}

/// Hands over what waits, or notes in the files how far messages were handed over when they flow no more.
inline void Topic::update_flow() {
  for (auto& segment : log.segments) deferred = deferred || segment->deferred_records > 0;
  if (flows()) distribute();
  if (flows() != log.follows) mark_segments();
  broker.cool_later(*this);
}
inline void Topic::mark_segments() {
  log.follows = flows();
  for (auto& segment : log.segments) {
    if (segment->end() < distributed_ && !log.follows) continue;
    if (!segment->file.open().ok() || (log.follows && segment->mark() == Segment::kFollows)) continue;
    const auto handed = static_cast<uint32_t>(std::max(distributed_, segment->first) - segment->first);
    segment->set_mark(log.follows ? Segment::kFollows : handed, broker.storage);
  }
}

inline void Topic::pause(bool pause) {
  paused = pause;
  update_flow();
  broker.metadata_changed = broker.metadata_awaited = true;
}
inline void Topic::hold_back(bool hold) {
  held_back = hold;
  update_flow();
}

/// Drops what was not handed to the channels yet.
inline void Topic::empty() {
  const Status status = log.truncate(distributed_);
  if (!status.ok()) broker.logger.say(Level::kError, "TOPIC(", name, "): cannot be emptied now - ", status.error);
}

/// A sealed segment goes when every channel has passed it and nothing in it is held.
inline void Topic::release_if_done(Segment& segment) {
  if (!segment.sealed || segment.held > 0 || segment.end() > distributed_) return;
  for (auto& [channel_name, channel] : channels)
    if (channel->needs(segment)) return;
  for (auto& [channel_name, channel] : channels) channel->forget(segment);
  log.release(segment);
}
inline void Topic::release_done() {
  for (size_t i = log.segments.size(); i-- > 0;) release_if_done(*log.segments[i]);
}
/// When the last segment is a large one and every channel has finished all of it, its space is given back, too.
inline void Topic::retire_drained_tail() {
  Segment* tail = log.tail();
  if (tail == nullptr || tail->held > 0 || tail->end() > distributed_) return;
  for (auto& [channel_name, channel] : channels)
    if (channel->needs(*tail)) return;
  tail->sealed = true;
  release_if_done(*tail);
}

inline void Topic::close(bool remove_files) {
  broker.logger.say(Level::kInfo, "TOPIC(", name, "): ", remove_files ? "deleting" : "closing");
  for (auto& [channel_name, channel] : channels) channel->close(remove_files);
  if (remove_files) log.remove_all();
}

inline void Topic::pump() {
  if (std::exchange(deferred, false))
    for (auto& [channel_name, channel] : channels) channel->pass_deferred();
  for (size_t i = 0; i < hungry.size();) {
    Channel& channel = *hungry[i];
    channel.pump();
    if (channel.hungry()) {
      ++i;
    } else {
      channel.listed = false;
      hungry[i] = hungry.back();
      hungry.pop_back();
    }
  }
  for (Channel* channel : bounded) channel->trim();
}

/// Segments stay mapped where a cursor is, and where messages come in.
inline void Topic::cool() {
  for (auto& segment : log.segments)
    if (segment->readers == 0 && segment->sealed) segment->file.close();
  for (auto& [channel_name, channel] : channels) channel->cool();
}

inline int64_t Topic::unmapped(uint64_t begin, uint64_t end) const {
  int64_t messages = 0;
  for (const auto& segment : log.segments) {
    const uint64_t first = std::max(begin, segment->first), last = std::min(end, segment->end());
    if (!segment->file.mapped() && last > first) messages += static_cast<int64_t>(last - first);
  }
  return messages;
}

/// After a restart, when segments and ledgers are there: how far messages were handed over, and where each channel is.
inline void Topic::resume() {
  distributed_ = log.end();
  for (auto& segment : log.segments) {
    if (segment->mark() >= segment->count) continue;
    distributed_ = segment->first + segment->mark();
    break;
  }
  for (auto& [channel_name, channel] : channels) log.skip_to(channel->cursor());
  for (auto& [channel_name, channel] : channels) distributed_ = std::max(distributed_, channel->cursor());
  for (auto& [channel_name, channel] : channels) channel->resume();
  log.follows = !flows();  // so that what the files say is brought up to date
  update_flow();
  release_done();
}
/// What was imported had been handed over already.
inline void Topic::hand_over_all() {
  distributed_ = log.end();
  if (!flows()) mark_segments();
}

// ---- Broker ----------------------------------------------------------------------------------------------------------

inline Topic& Broker::topic(std::string_view name) {
  if (Topic* found = find(name)) return *found;
  Topic& made = *topics.emplace(name, std::make_unique<Topic>(*this, std::string(name))).first->second;
  logger.say(Level::kInfo, "TOPIC(", name, "): created");
  changed(made, nullptr, true);
  return made;
}

inline void Broker::delete_topic(Topic& topic) {
  ++deletions;
  topic.close(true);
  const auto gone = std::move(topics.find(topic.name)->second);
  topics.erase(topic.name);
  for (auto* list : {&touched_, &cooling_}) list->erase(std::remove(list->begin(), list->end(), gone.get()), list->end());
  for (auto& [name, channel] : gone->channels) changed(*gone, channel.get(), false);
  changed(*gone, nullptr, false);
}

inline void Broker::changed(const Topic& topic, const Channel* channel, bool created) {
  if (!topic.ephemeral && !(channel != nullptr && channel->ephemeral)) metadata_changed = true;
  if (on_change) on_change(topic, channel, created);
}

inline void Broker::touch(Topic& topic) { if (!std::exchange(topic.touched, true)) touched_.push_back(&topic); }
inline void Broker::cool_later(Topic& topic) { if (!std::exchange(topic.cooling, true)) cooling_.push_back(&topic); }
inline void Broker::pump() {
  for (size_t i = 0; i < touched_.size(); ++i) {
    touched_[i]->touched = false;
    touched_[i]->pump();
  }
  touched_.clear();
}
inline void Broker::after_write() {
  for (Topic* topic : cooling_) {
    topic->cooling = false;
    topic->cool();
  }
  cooling_.clear();
}

inline Metadata Broker::metadata() const {
  Metadata metadata;
  for (const auto& [name, topic] : topics) {
    if (topic->ephemeral) continue;
    metadata.topics.push_back({name, topic->paused, {}});
    for (const auto& [channel_name, channel] : topic->channels)
      if (!channel->ephemeral) metadata.topics.back().channels.push_back({channel_name, channel->paused});
  }
  return metadata;
}

inline void Broker::close() {
  serving = false;
  for (auto& [name, topic] : topics) topic->close(false);
  spares.remove_all();
}

// ---------------------------------------------------------------------------------------------------------------------
// [8] Recovery
//
// What a start finds in the data path: nsqd.dat, our own files, and the disk queues of an nsqd that ran here before.
// Always: a file is removed only when all that it holds is finished, was never valid, or has been stored elsewhere and synced;
// what this program does not know stays untouched.
// ---------------------------------------------------------------------------------------------------------------------

/// Reads what an earlier process left in the data path into a broker. Throws what must stop the start.
class Recovery {
 public:
  explicit Recovery(Broker& broker) : broker_(broker), directory_(broker.storage.directory) {}

  void run() {
    const auto boot = read_file("/proc/sys/kernel/random/boot_id").value_or("");  // where there is none, no reboot is noticed
    broker_.storage.boot = checksum(1, boot.data(), boot.size());
    if (const auto content = read_file(directory_ + "/nsqd.dat")) take_names(Metadata::parse(*content, directory_ + "/nsqd.dat"));
    for (const std::string& name : list_directory()) sort(name);
    for (auto& [name, topic] : broker_.topics) {
      take_segments(*topic, segments_[name]);
      for (auto& [channel_name, channel] : topic->channels) channel->recover();
      topic->resume();
    }
    import_queues();
    for (auto& [name, topic] : broker_.topics)
      for (auto& segment : topic->log.segments) segment->file.close();
  }

 private:
  void take_names(const Metadata& metadata) {
    const auto valid = [this](const std::string& name, std::string_view kind) {
      if (!valid_name(name)) broker_.logger.say(Level::kWarning, "skipping creation of invalid ", kind, " ", name);
      return valid_name(name);
    };
    for (const auto& topic : metadata.topics) {
      if (!valid(topic.name, "topic")) continue;
      Topic& made = broker_.topic(topic.name);
      made.paused = made.paused || topic.paused;
      for (const auto& channel : topic.channels)
        if (valid(channel.name, "channel")) need(made, channel.name).paused = channel.paused;
    }
  }
  Channel& need(Topic& topic, const std::string& name) {
    if (Channel* found = topic.find(name)) return *found;
    return *topic.channels.emplace(name, std::make_unique<Channel>(topic, name)).first->second;
  }

  std::vector<std::string> list_directory() const {
    const std::unique_ptr<DIR, int (*)(DIR*)> directory(::opendir(directory_.c_str()), ::closedir);
    if (directory == nullptr) throw_unless(system_error("read directory", directory_));
    std::vector<std::string> names;
    while (const dirent* entry = ::readdir(directory.get())) names.emplace_back(entry->d_name);
    std::sort(names.begin(), names.end());
    return names;
  }

  /// Our files are topic.<first message, 20 digits>.segment and topic:channel.ledger, those of nsqd queue.diskqueue.<…>.dat.
  void sort(const std::string& name) {
    const std::string path = directory_ + "/" + name, stem = name.substr(0, name.rfind('.'));
    if (name == "nsqd.dat.tmp" || ends_with(name, ".spare")) {  // of no use any more
      ::unlink(path.c_str());
    } else if (const size_t at = name.find(".diskqueue."); at != name.npos && ends_with(name, ".dat")) {
      auto& files = queues_[name.substr(0, at)];
      if (const auto number = decimal(name.substr(at + 11, name.size() - at - 15))) files.insert(*number);
    } else if (ends_with(name, ".segment") && stem.size() > 21) {
      const std::string topic = stem.substr(0, stem.size() - 21);
      const auto first = decimal(stem.substr(stem.size() - 20));
      if (!valid_name(topic) || !first || remove_if_blank(path)) return;
      known(topic);
      segments_[topic].push_back(static_cast<uint64_t>(*first));
    } else if (const size_t colon = name.find(':'); colon != name.npos && ends_with(name, Ledger::kSuffix)) {
      const std::string topic = name.substr(0, colon), channel = stem.substr(colon + 1);
      if (!valid_name(topic) || !valid_name(channel) || remove_if_blank(path)) return;
      Topic& parent = known(topic);
      if (parent.find(channel) != nullptr) return;
      broker_.logger.say(Level::kWarning, "LOG: nsqd.dat does not name channel ", channel, " of topic ", topic, "; taken up");
      broker_.changed(parent, &need(parent, channel), true);
    }
  }
  Topic& known(const std::string& name) {
    if (broker_.find(name) == nullptr)
      broker_.logger.say(Level::kWarning, "LOG: nsqd.dat does not name topic ", name, ", which has messages; taken up");
    return broker_.topic(name);
  }
  /// A small file of zeros is one whose making was cut short.
  static bool remove_if_blank(const std::string& path) {
    if (file_size(path) > kPageSize) return false;
    return read_file(path).value_or("").find_first_not_of('\0') == std::string::npos && ::unlink(path.c_str()) == 0;
  }

  void take_segments(Topic& topic, const std::vector<uint64_t>& firsts) {
    for (const uint64_t first : firsts) {
      const std::string path = topic.log.path(first);
      const auto need = [&path](bool good, std::string_view otherwise) {
        if (!good) throw std::runtime_error(text(path, otherwise));
      };
      need(file_size(path) >= kPageSize, " is shorter than any segment; restore it from a copy, or move it away");
      auto segment = std::make_unique<Segment>(path, file_size(path), first);
      throw_unless(segment->file.open());
      if (!segment->recover(first == firsts.back(), broker_.logger)) {
        segment->file.remove();
        continue;
      }
      need(topic.log.end() <= first, " overlaps the segment before it; restore the data path from a copy");
      if (segment->count > 0) broker_.ids.skip_past(Segment::id_of(segment->frame(segment->count - 1)));
      topic.log.adopt(std::move(segment));
    }
  }

  // ---- The disk queues of nsqd: one per topic and channel, records of 4 bytes length and a message -----------------------

  struct Position {
    int64_t file = 0;
    size_t offset = 0;
  };
  static constexpr size_t kBatch = 10000;  // messages between two syncs; what a kill during the import may double

  /// The queues of channels first: they are older than what their topic still holds.
  void import_queues() {
    for (const bool of_channels : {true, false}) {
      for (const auto& [queue, files] : queues_) {
        const size_t colon = queue.find(':');
        if ((colon != queue.npos) != of_channels) continue;
        const std::string topic = queue.substr(0, colon), channel = of_channels ? queue.substr(colon + 1) : "c";
        if (!valid_name(topic) || is_ephemeral(topic) || !valid_name(channel)) {
          broker_.logger.say(Level::kWarning, "DISKQUEUE(", queue, "): left alone, it belongs to nothing that is kept");
          continue;
        }
        Topic& to = broker_.topic(topic);
        Status status;
        Channel* of = of_channels ? to.channel(channel, status) : nullptr;
        check(status);
        import_queue(queue, files, to, of);
      }
    }
  }

  void import_queue(const std::string& queue, const std::set<int64_t>& files, Topic& topic, Channel* channel) {
    const std::string meta = queue + ".diskqueue.meta.dat", content = read_file(directory_ + "/" + meta).value_or("");
    long long depth = 0, number = 0, offset = 0;
    const int read = std::sscanf(content.c_str(), "%lld\n%lld,%lld", &depth, &number, &offset);
    const bool there = depth <= 0 || files.empty() || number <= *files.rbegin();  // what is unread is in some file
    const bool known = read == 3 && number >= 0 && offset >= 0 && there;
    Position at = known ? Position{number, static_cast<size_t>(offset)} : Position();
    size_t imported = 0;
    const auto warn = [&](const std::string& what) { broker_.logger.say(Level::kWarning, "DISKQUEUE(", queue, "): ", what); };
    if (!known) warn("how far it was read is not known; all of it is taken");
    for (const int64_t file : files) {
      const std::string digits = std::to_string(file), zeros(6 - std::min<size_t>(6, digits.size()), '0');
      const std::string name = text(queue, ".diskqueue.", zeros, digits, ".dat");
      if (file > at.file) {
        if (known) warn(text("file ", at.file, " is missing; going on with ", file));
        at = {file, 0};
      }
      if (file == at.file) {
        imported += import_file(name, meta, at, topic, channel);
        at = {saturating_add(file, 1), 0};
        save_position(meta, at);
      }
      ::unlink((directory_ + "/" + name).c_str());  // read, now or by the one before us
    }
    ::unlink((directory_ + "/" + meta).c_str());
    broker_.logger.say(Level::kInfo, "DISKQUEUE(", queue, "): took over ", imported, " messages of an earlier nsqd");
  }

  size_t import_file(const std::string& name, const std::string& meta, Position& at, Topic& topic, Channel* channel) {
    const std::string content = read_file(directory_ + "/" + name).value_or("");
    const auto record = [&] {  // the next one; nothing where the file ends or is damaged
      const std::string_view rest = std::string_view(content).substr(std::min(at.offset, content.size()));
      const size_t size = rest.size() < 4 ? 0 : get_be<uint32_t>(rest.data());
      return size > 26 && size <= rest.size() - 4 ? rest.substr(4, size) : std::string_view();
    };
    size_t imported = 0;
    while (!record().empty()) {
      const uint64_t first = topic.log.end();
      std::vector<uint16_t> attempts;
      for (std::string_view next; attempts.size() < kBatch && !(next = record()).empty(); at.offset += 4 + next.size()) {
        attempts.push_back(get_be<uint16_t>(next.data() + 8));
        check(topic.log.append(MessageId::from(next.data() + 10), get_be<int64_t>(next.data()), next.substr(26)));
      }
      topic.log.commit();
      hand_over(topic, channel, first, attempts);
      for (const std::string& path : std::exchange(broker_.storage.dirty, {})) check(sync_file(path));
      check(sync_path(directory_));
      ++broker_.storage.epoch;
      save_position(meta, at);
      imported += attempts.size();
    }
    if (at.offset < content.size()) {
      broker_.logger.say(Level::kWarning, "DISKQUEUE: ", directory_, "/", name, " is broken off or damaged at offset ", at.offset,
                         "; the rest is kept as ", name, ".bad");
      check(replace_file(directory_, name + ".bad", std::string_view(content).substr(at.offset)));
    }
    return imported;
  }
  /// What a channel's queue held is for that channel alone; what a topic's held waits for the topic.
  void hand_over(Topic& topic, Channel* channel, uint64_t first, const std::vector<uint16_t>& attempts) {
    if (channel == nullptr) return topic.update_flow();
    topic.hand_over_all();
    for (size_t i = 0; i < attempts.size(); ++i) channel->take_over(first + i, attempts[i]);
    for (auto& [name, other] : topic.channels)
      if (other.get() != channel) other->skip(first, topic.log.end());
  }
  void save_position(const std::string& meta, const Position& at) {
    check(replace_file(directory_, meta, text("0\n", at.file, ",", at.offset, "\n", at.file, ",", at.offset, "\n")));
  }
  static void check(const Status& status) {
    if (!status.ok()) throw std::runtime_error("failed to take over the queue of an earlier nsqd - " + status.error);
  }

  Broker& broker_;
  const std::string directory_;
  std::map<std::string, std::vector<uint64_t>> segments_;  // by topic, ascending
  std::map<std::string, std::set<int64_t>> queues_;        // of nsqd: the numbers of their files
};

// ---------------------------------------------------------------------------------------------------------------------
// [9] Protocol V2
//
// What NSQ's clients speak over TCP: lines with commands, some with a body, answered by frames. And the contract of
// every session: bytes go in, bytes come out, and only the loop ([14]) touches the socket.
// Always: a command is carried out once, when all of it has arrived, and in the order of arrival.
// ---------------------------------------------------------------------------------------------------------------------

/// One side of a connection. The loop calls it; what it has to say it appends to port.out.
class Session : public std::enable_shared_from_this<Session> {
 public:
  enum State { kInit = 0, kSubscribed = 3, kClosing = 4 };  // with the numbers of nsqd 1.3.0, which GET /stats shows
  virtual ~Session() = default;
  /// Carries out what is complete and returns how many bytes are done with; the rest is given again, with more.
  virtual size_t feed(std::string_view input) = 0;
  virtual void ended(std::string_view rest) = 0;  // the peer sends no more; `rest` is what feed has left over
  virtual void drained() {}                       // more of the output was written
  virtual void connected() {}
  virtual ClientStats stats() const { return {}; }
  void unpark() {
    parked = false;
    resumed = true;
    port.attend();
  }
  Port port;
  bool parked = false;   // it waits for another server's answer, and is not fed meanwhile
  bool resumed = false;  // it does so no more
  bool late = false;     // its time for a command or request is up: treat its input as ended
  uint64_t written = 0;  // bytes that the loop has written for it
};

/// A pattern of an auth server: POSIX extended, so that no name can make it slow. nsqd's users write Go's patterns:
/// classes such as \d or \W, escapes in brackets and non-capturing groups are put in POSIX's words.
class Pattern {
 public:
  explicit Pattern(std::string_view go) {
    std::string posix;
    for (bool in_set = false; !go.empty();) {
      const std::string_view piece = take_front(go, go[0] == '\\' ? 2 : 1);
      const char kind = piece.size() == 2 ? lower(piece[1]) : '\0';
      const std::string_view set = kind == 'd' ? "0-9" : kind == 'w' ? "0-9A-Za-z_" : kind == 's' ? "[:space:]" : "";
      if (set.empty()) posix += in_set && kind != '\0' ? text("[.", piece.substr(1), ".]") : text(piece);
      else posix += in_set ? text(set) : text(piece[1] == kind ? "[" : "[^", set, "]");
      if (piece == "[" || piece == "]") in_set = piece == "[";
      if (piece == "(" && !in_set && go.substr(0, 2) == "?:") go.remove_prefix(2);
    }
    auto compiled = std::make_unique<regex_t>();
    if (!cheap(posix) || ::regcomp(compiled.get(), posix.c_str(), REG_EXTENDED | REG_NOSUB) != 0) return;
    regex_.reset(compiled.release(), [](regex_t* old) { ::regfree(std::unique_ptr<regex_t>(old).get()); });
  }
  bool valid() const { return regex_ != nullptr; }
  bool matches(const std::string& s) const { return valid() && ::regexec(regex_.get(), s.c_str(), 0, nullptr, 0) == 0; }

 private:
  /// regcomp writes repetitions out, and takes hours for some nestings. So a group that is repeated may hold no count and no
  /// repeated group, nothing is repeated twice, no alternative is empty, and there are no back references (nor in Go).
  static bool cheap(std::string_view posix) {
    std::vector<bool> costly(1, false);  // the open groups: whether a count or a repeated group is in it
    bool in_set = false, fine = posix.size() <= 512 && posix.find('\0') == posix.npos;
    for (char before = '('; fine && !posix.empty();) {
      const char c = take_front(posix, 1)[0], next = posix.empty() ? '\0' : posix[0];
      if (c == '\\') fine = kDigits.find(take_front(posix, 1)) == kDigits.npos;
      if (c == '[' || c == ']') in_set = c == '[';
      if (!in_set && c == '(') costly.push_back(false);
      if (!in_set && (c == ')' || c == '|')) fine = before != '(' && before != '|';
      if (!in_set && c == ')' && costly.size() > 1) {
        const bool repeated = next == '*' || next == '+' || next == '{', inside = costly.back();
        costly.pop_back();
        costly.back() = costly.back() || repeated || inside;
        fine = fine && !(repeated && inside);
      }
      const bool repeats = !in_set && std::string_view("*+?{").find(c) != std::string_view::npos;
      fine = fine && !(repeats && std::string_view("*+?}").find(before) != std::string_view::npos);
      if (!in_set && c == '{') costly.back() = true;
      fine = fine && costly.size() <= 32;
      before = c;
    }
    return fine;
  }
  std::shared_ptr<regex_t> regex_;
};

/// What an auth server granted to a client.
struct AuthGrant {
  struct Authorization {
    Pattern topic;
    std::vector<Pattern> channels = {};
    bool publish = false, subscribe = false;
  };
  int64_t expires = 0;  // monotonic
  std::string identity, identity_url;
  std::vector<Authorization> authorizations;

  /// An empty channel means publishing; then, too, a channel pattern must match it.
  bool allows(const std::string& topic, const std::string& channel) const {
    for (const Authorization& a : authorizations)
      if ((channel.empty() ? a.publish : a.subscribe) && a.topic.matches(topic))
        for (const Pattern& pattern : a.channels)
          if (pattern.matches(channel)) return true;
    return false;
  }
};

class V2Session;

/// What sessions need of the daemon around the broker.
struct Host {
  Host(Broker& of, Options& changeable, Logger& log) : broker(of), options(changeable), logger(log) {}
  Broker& broker;
  Options& options;
  Logger& logger;
  int64_t started_wall = 0;
  int tcp_port = 0, http_port = 0;  // as listened on
  std::function<void(V2Session&)> ask_auth;  // parks the session until auth_answered
  std::function<bool(std::string_view topic, Session&)> look_up;  // true: parked, a new topic's channels are asked for
  std::function<void(const std::function<void(const Session&)>&)> each_session;
  std::function<void(std::vector<std::string>)> set_lookupds;
  std::function<size_t()> connections;
};

/// A client. Each command is a member function; the steps that it is made of return whether to go on: false after an
/// error or, with needed_ set, when the whole command is to be tried again.
class V2Session : public Session {
 public:
  V2Session(Host& host, std::string address, std::string ip)
      : host_(host), broker_(host.broker), ip_(std::move(ip)) {
    about_.remote_address = std::move(address);
    about_.client_id = about_.hostname = ip_;
    about_.connected_at = broker_.now.wall / kSecond;
    port.session = this;
    set_timer();
  }
  ~V2Session() override {
    if (port.consumer != nullptr) port.consumer->channel.unsubscribe(*port.consumer);
    broker_.logger.say(Level::kInfo, "PROTOCOL(V2): [", about_.remote_address, "] exiting ioloop");
  }

  size_t feed(std::string_view input) override {
    size_t used = 0, size = input.size() < needed_ ? 0 : 1;
    for (; size > 0 && used < input.size() && !parked && !port.closing && !port.dropped; used += size)
      size = quick_fin(input.data() + used, input.size() - used) ? kFinSize : step(input.substr(used));
    return used;
  }
  /// A command cut off within its body gets the error of that command; within its line, silence.
  void ended(std::string_view rest) override {
    final_ = true;
    if (!rest.empty() && magic_seen_ && !port.closing && !port.dropped) step(rest);
    port.closing = true;
  }
  void drained() override {
    if (port.consumer != nullptr && !port.consumer->listed) port.consumer->channel.consider(*port.consumer);
  }
  /// The auth server has answered (null: nothing that can be used); the command that waits for it is tried again.
  void auth_answered(std::shared_ptr<const AuthGrant> grant) {
    auth_failed_ = grant == nullptr;
    if (!auth_failed_) grant_ = std::move(grant);
    unpark();
  }
  const std::string& secret() const { return secret_; }
  const std::string& ip() const { return ip_; }

  ClientStats stats() const override {
    ClientStats shown = about_;
    shown.connected_for = broker_.now.steady - connected_;
    shown.pub_counts.assign(published_.begin(), published_.end());
    shown.authed = grant_ != nullptr;
    shown.auth_identity = shown.authed ? grant_->identity : "";
    shown.auth_identity_url = shown.authed ? grant_->identity_url : "";
    if (port.consumer != nullptr) port.consumer->count_in(shown);
    return shown;
  }

 private:
  static constexpr unsigned kFirst = 1 << kInit, kOpen = 1 << kSubscribed, kConsuming = kOpen | 1 << kClosing;
  static constexpr unsigned kAlways = kFirst | kConsuming;
  static constexpr size_t kFinSize = 21;  // FIN, a space, an id, a newline
  enum class Part { kSize, kBody, kMessage };  // what follows a line; kSize: a body whose size is not believed
  struct Command {
    std::string_view name;
    unsigned states;  // in which it is allowed, a bit for each
    size_t words;     // at least; where there is more than the name, the second is a message's id or a topic
    bool (V2Session::*run)();
  };

  /// Carries out the command at the front and returns its size, or 0 when it has to be tried again.
  size_t step(std::string_view input) {
    static constexpr size_t kLongestLine = 16384;  // as nsqd 1.3.0
    if (!magic_seen_) {
      const std::string_view magic = input.substr(0, 4);
      if (magic.size() < 4) return 0;
      broker_.logger.say(Level::kInfo, "CLIENT(", about_.remote_address, "): desired protocol magic '", magic, "'");
      magic_seen_ = magic == "  V2";
      if (!magic_seen_) fail("E_BAD_PROTOCOL");
      last_command_ = broker_.now.steady;
      return 4;
    }
    const size_t end = input.substr(0, kLongestLine).find('\n');
    port.dropped = end == input.npos && input.size() >= kLongestLine;
    if (end == input.npos) return 0;
    input_ = input;
    used_ = end + 1;
    needed_ = 0;
    dispatch(input.substr(0, end));
    if (needed_ > 0) return 0;
    last_command_ = broker_.now.steady;
    checked_ = checked_end_ = 0;
    return used_;
  }
  /// The short way for what a consumer says most: a FIN of its message. All else takes the long one. (A view that is
  /// handed on is stored as two words and loaded as one, which stalls: half of step()'s time when this took one.)
  bool quick_fin(const char* input, size_t size) {
    const bool fin = size >= kFinSize && input[kFinSize - 1] == '\n' && std::memcmp(input, "FIN ", 4) == 0;
    if (!fin || port.consumer == nullptr) return false;
    if (!channel().finish(*port.consumer, MessageId::from(input + 4)).empty()) return false;
    last_command_ = broker_.now.steady;
    return true;
  }
  /// Finds the command, checks what its line alone can tell, in nsqd's order and words, and runs it.
  bool dispatch(std::string_view line) {
    using S = V2Session;
    static constexpr Command kCommands[] = {  // those that come most often come first
        {"FIN", kConsuming, 2, &S::fin}, {"PUB", kAlways, 2, &S::pub},        {"RDY", kConsuming, 1, &S::rdy},
        {"REQ", kConsuming, 3, &S::req}, {"TOUCH", kConsuming, 2, &S::touch}, {"MPUB", kAlways, 2, &S::mpub},
        {"DPUB", kAlways, 3, &S::pub},   {"NOP", kAlways, 1, &S::nop},        {"SUB", kFirst, 3, &S::sub},
        {"CLS", kOpen, 1, &S::cls},      {"AUTH", kFirst, 1, &S::auth},       {"IDENTIFY", kFirst, 1, &S::identify}};
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    for (words_ = 0; words_ < word_.size(); line.remove_prefix(1)) {
      word_[words_++] = take_front(line, line.find(' '));
      if (line.empty()) break;
    }
    const std::string_view name = word_[0];
    const auto* command = std::begin(kCommands);
    while (command != std::end(kCommands) && command->name != name) ++command;
    if (command == std::end(kCommands)) return fail("E_INVALID invalid command ", name);
    const bool id = command->words > 1 && command->states == kConsuming, topic = command->words > 1 && !id;
    if ((command->states >> about_.state & 1) == 0) return fail("E_INVALID cannot ", name, " in current state");
    if (heartbeat_ == kNever && name == "SUB") return fail("E_INVALID cannot SUB with heartbeats disabled");
    if (words_ < command->words) return fail("E_INVALID ", name, " insufficient number of param", id ? "s" : "eters");
    if (id && word_[1].size() != 16) return fail("E_INVALID invalid message ID");
    if (!topic || is_last(word_[1]) || valid_name(word_[1])) return (this->*command->run)();
    const std::string_view code = name == "MPUB" ? "E_BAD_TOPIC E_BAD_TOPIC " : "E_BAD_TOPIC ";
    return fail(code, name, " topic name ", quoted(word_[1]), " is not valid");
  }

  bool respond(std::string_view data, uint32_t frame_type = 0) {
    port.out.append_frame(frame_type, data);
    port.attend();
    return frame_type == 0;
  }
  /// An error that leaves the connection open, and one that does not.
  bool complain(std::string_view error) {
    broker_.logger.say(Level::kError, "[", about_.remote_address, "] - ", error);
    return respond(error, 1);
  }
  template <typename... Parts>
  bool fail(const Parts&... parts) {
    port.closing = true;
    return complain(text(parts...));
  }
  /// To be tried again, when so much of the command is there and the session is not parked.
  bool wait(size_t needed) { return needed_ = needed, false; }
  bool missing(size_t bytes, std::string_view code, std::string_view noun) {
    return final_ ? fail(code, word_[0], " failed to read ", noun) : wait(used_ + bytes);
  }

  /// Takes a size of 4 bytes, and as many bytes.
  bool take(Part part, std::string_view& bytes) {
    const bool message = part == Part::kMessage;
    const std::string_view rest = input_.substr(used_), code = message ? "E_BAD_MESSAGE " : "E_BAD_BODY ";
    const int64_t most = message ? broker_.options.max_msg_size : broker_.options.max_body_size;
    const int64_t size = rest.size() < 4 ? 0 : static_cast<int32_t>(get_be<uint32_t>(rest.data()));
    const size_t whole = 4 + (part == Part::kSize || size < 0 ? 0 : static_cast<size_t>(size));
    if (size > 0 && size <= most && rest.size() >= whole) {
      bytes = rest.substr(4, whole - 4);
      used_ += whole;
      return true;
    }
    if (size > most) return fail(code, word_[0], message ? " message" : " body", " too big ", size, " > ", most);
    if (size > 0) return missing(whole, code, message ? "message body" : "body");
    const std::string which = !message ? "" : word_[0] == "MPUB" ? text("message(", checked_, ") ") : "message ";
    if (rest.size() < 4) return missing(4, code, which + "body size");
    return fail(code, word_[0], " invalid ", which, "body size ", size);
  }
  /// A decimal parameter: digits only, nothing is 0, and what does not fit wraps, as in nsqd 1.3.0.
  bool take_decimal(size_t which, std::string_view what, uint64_t& number) {
    number = 0;
    for (const char c : word_[which]) number = number * 10 + static_cast<uint64_t>(c - '0');
    const bool good = word_[which].find_first_not_of(kDigits) == std::string_view::npos;
    return good || fail("E_INVALID ", word_[0], " could not parse ", what, " ", word_[which]);
  }

  /// Whether there is a grant whose time is not over; else the auth server is asked, and the command waits.
  bool granted() {
    if (std::exchange(auth_failed_, false)) return fail("E_AUTH_FAILED AUTH failed");
    if (grant_ != nullptr && grant_->expires > broker_.now.steady) return true;
    host_.ask_auth(*this);
    return wait(1);
  }
  /// Whether this client may do the command at hand; an empty channel means publishing.
  bool authorized(std::string_view channel) {
    if (broker_.options.auth_http_address.empty()) return true;
    if (!auth_done_) return fail("E_AUTH_FIRST AUTH required before ", word_[0]);
    if (!granted()) return false;
    if (grant_->allows(std::string(word_[1]), std::string(channel))) return true;
    return fail("E_UNAUTHORIZED AUTH failed for ", word_[0], " on ", quoted(word_[1]), " ", quoted(channel));
  }
  /// The topic that the command names, made where it is missing. Null where this client may not, or has to wait: for
  /// the auth server, or for nsqlookupd, which is asked for the channels of a new topic.
  Topic* open_topic(std::string_view channel = {}) {
    if (!authorized(channel)) return nullptr;
    if (is_last(word_[1])) return last_.topic;
    Topic* known = broker_.find(word_[1]);
    if (known == nullptr && host_.look_up(word_[1], *this)) return wait(1), nullptr;
    return known != nullptr ? known : &broker_.topic(word_[1]);
  }

  /// Whether the last publish went there, as it nearly always did.
  bool is_last(std::string_view name) const {
    return last_.topic != nullptr && last_.deletions == broker_.deletions && last_.topic->name == name;
  }

  // ---- commands -----------------------------------------------------------------------------------------------------

  /// A number of an IDENTIFY: in `unit` from `least` to `most`, -1 for `off` (-1: cannot be), 0 to keep what was.
  struct Number {
    std::string key;
    int64_t& setting;
    int64_t least, most, unit, off, given = 0;
  };
  /// As Go decodes it: null is as good as nothing, and one member of a wrong type spoils the whole.
  bool identify() {
    using Type = Json::Type;
    const Options& options = broker_.options;
    std::string_view body;
    if (!take(Part::kBody, body)) return false;
    broker_.logger.say(Level::kInfo, "[", about_.remote_address, "] IDENTIFY: ", body.substr(0, 1000));
    JsonParser parser{body};
    const Json told = parser.parse();
    bool good = parser.error.empty() && (told.is(Type::kObject) || told.is(Type::kNull));
    auto member = [&](std::string_view key, Type type) -> const Json& {
      const Json& found = told.get(key);
      good = good && (found.is(Type::kNull) || (found.is(type) && (type != Type::kNumber || found.integer())));
      return found;
    };
    const std::tuple<std::string_view, std::string&> texts[] = {
        {"client_id", about_.client_id}, {"hostname", about_.hostname}, {"user_agent", about_.user_agent},
        {"topology_region", about_.topology_region}, {"topology_zone", about_.topology_zone}};
    for (auto& [key, shown] : texts) shown = member(key, Type::kString).string;
    const bool negotiates = member("feature_negotiation", Type::kBool).boolean;
    for (const auto* declined : {"tls_v1", "deflate", "snappy"}) member(declined, Type::kBool);
    member("deflate_level", Type::kNumber);
    auto ms = [](Duration bound) { return bound.count() / kMillisecond; };
    Number numbers[] = {
        {"heartbeat_interval", heartbeat_, 1000, ms(options.max_heartbeat_interval), kMillisecond, kNever},
        {"output_buffer_timeout", buffer_timeout_, ms(options.min_output_buffer_timeout),
         ms(options.max_output_buffer_timeout), kMillisecond, 0},
        {"output_buffer_size", buffer_size_, 64, options.max_output_buffer_size, 1, 1},
        {"sample_rate", sample_rate_, 0, 99, 1, -1},
        {"msg_timeout", msg_timeout_, 1000, ms(options.max_msg_timeout), kMillisecond, -1}};
    for (Number& number : numbers) number.given = member(number.key, Type::kNumber).integer().value_or(0);
    if (!good) return fail("E_BAD_BODY IDENTIFY failed to decode JSON body");
    for (Number& n : numbers) {
      const bool off = n.given == -1 && n.off != -1, fits = n.given >= n.least && n.given <= n.most;
      std::replace(n.key.begin(), n.key.end(), '_', ' ');
      if (!off && !fits && n.given != 0) return fail("E_BAD_BODY IDENTIFY ", n.key, " (", n.given, ") is invalid");
      if (off || fits) n.setting = off ? n.off : n.given * n.unit;
    }
    if (told.get("output_buffer_size").integer() == -1) buffer_timeout_ = 0;
    about_.sample_rate = static_cast<int>(sample_rate_);
    if (!std::exchange(identified_, true)) {
      const bool region = about_.topology_region == options.topology_region, zone = about_.topology_zone == options.topology_zone;
      if (topology_aware(options)) distance_ = zone ? Consumer::kSameZone : region ? Consumer::kSameRegion : distance_;
      std::tie(beat_, delivery_timeout_, delivery_sample_rate_) = std::tie(heartbeat_, msg_timeout_, sample_rate_);
      next_heartbeat_ = saturating_add(broker_.now.steady, beat_);
    }
    set_timer();
    if (!negotiates) return respond("OK");
    JsonWriter json;
    json.open('{').member("max_rdy_count", options.max_rdy_count).member("version", kProtocolVersion);
    json.member("max_msg_timeout", options.max_msg_timeout.count() / kMillisecond);
    json.member("msg_timeout", msg_timeout_ / kMillisecond).member("tls_v1", false).member("deflate", false);
    json.member("deflate_level", std::min<int64_t>(6, options.max_deflate_level));
    json.member("max_deflate_level", options.max_deflate_level).member("snappy", false);
    json.member("sample_rate", sample_rate_).member("auth_required", !options.auth_http_address.empty());
    json.member("output_buffer_size", buffer_size_).member("output_buffer_timeout", buffer_timeout_ / kMillisecond);
    json.member("topology_region", options.topology_region).member("topology_zone", options.topology_zone).close('}');
    return respond(json.out);
  }
  bool auth() {
    std::string_view secret;
    if (words_ != 1) return fail("E_INVALID AUTH invalid number of parameters");
    if (!take(Part::kBody, secret)) return false;
    if (auth_done_) return fail("E_INVALID AUTH already set");
    if (broker_.options.auth_http_address.empty()) return fail("E_AUTH_DISABLED AUTH disabled");
    secret_ = secret;
    if (!granted()) return false;
    const size_t count = grant_->authorizations.size();
    if (count == 0) return fail("E_UNAUTHORIZED AUTH no authorizations found");
    auth_done_ = true;
    JsonWriter json;
    json.open('{').member("identity", grant_->identity).member("identity_url", grant_->identity_url);
    return respond(json.member("permission_count", count).close('}').out);
  }
  bool sub() {
    const std::string_view name = word_[2];
    if (!valid_name(name)) return fail("E_BAD_CHANNEL SUB channel name ", quoted(name), " is not valid");
    Topic* topic = open_topic(name);
    if (topic == nullptr) return false;
    Status status;
    Channel* opened = topic->channel(name, status);
    if (opened == nullptr) return fail("E_SUB_FAILED SUB failed ", status.error);
    const int64_t most = broker_.options.max_channel_consumers;
    if (most > 0 && static_cast<int64_t>(opened->consumers.size()) >= most)
      return fail("E_SUB_FAILED SUB failed consumers for ", word_[1], ":", name, " exceeds limit of ", most);
    opened->subscribe(port, distance_, Duration(delivery_timeout_), static_cast<int>(delivery_sample_rate_));
    about_.state = kSubscribed;
    return respond("OK");
  }

  /// From SUB on there is one: a channel that goes takes the consumer away, but drops the connection with it.
  Channel& channel() const { return port.consumer->channel; }
  MessageId id() const { return MessageId::from(word_[1].data()); }
  bool rdy() {
    uint64_t number = 1;
    if (about_.state == kClosing) return true;
    if (words_ > 1 && !take_decimal(1, "count", number)) return false;
    const auto count = static_cast<int64_t>(number), most = broker_.options.max_rdy_count;
    if (count < 0 || count > most) return fail("E_INVALID RDY count ", count, " out of range 0-", most);
    channel().set_ready(*port.consumer, count);
    return true;
  }
  bool settle(std::string_view why) {
    return why.empty() || complain(text("E_", word_[0], "_FAILED ", word_[0], " ", word_[1], " failed ", why));
  }
  bool fin() { return settle(channel().finish(*port.consumer, id())); }
  bool touch() { return settle(channel().touch(*port.consumer, id(), msg_timeout_)); }
  bool req() {
    uint64_t ms = 0;
    if (!take_decimal(2, "timeout", ms)) return false;
    const auto asked = static_cast<int64_t>(ms * kMillisecond);  // beyond 292 years it wraps, and may mean now
    const int64_t delay = std::clamp<int64_t>(asked, 0, broker_.options.max_req_timeout.count());
    return settle(channel().requeue(*port.consumer, id(), delay));
  }
  bool cls() {
    channel().set_ready(*port.consumer, 0);
    about_.state = kClosing;
    return respond("CLOSE_WAIT");
  }
  bool nop() { return true; }

  /// PUB and DPUB.
  bool pub() {
    uint64_t ms = 0;
    std::string_view body;
    const auto most = static_cast<uint64_t>(broker_.options.max_req_timeout.count() / kMillisecond);
    if (word_[0] == "DPUB" && !take_decimal(2, "timeout", ms)) return false;
    if (ms > most) return fail("E_INVALID DPUB timeout ", ms, " out of range 0-", most);
    return take(Part::kMessage, body) && publish(open_topic(), &body, 1, static_cast<int64_t>(ms) * kMillisecond);
  }
  bool mpub() {
    Topic* topic = open_topic();
    std::vector<std::string_view> bodies;
    return topic != nullptr && take_bodies(bodies) && publish(topic, bodies.data(), bodies.size(), 0);
  }
  /// Looks at all messages before any is stored. What was found good is not looked at again when more has arrived.
  bool take_bodies(std::vector<std::string_view>& bodies) {
    std::string_view body;
    if (!take(Part::kSize, body)) return false;
    if (input_.size() - used_ < 4) return missing(4, "E_BAD_BODY ", "message count");
    const auto count = static_cast<int32_t>(get_be<uint32_t>(input_.data() + used_));
    const bool possible = count > 0 && count <= (broker_.options.max_body_size - 4) / 5;
    if (!possible) return fail("E_BAD_BODY MPUB invalid message count ", count);
    size_t at = used_ + 4;
    used_ = std::max(at, checked_end_);
    for (; checked_ < static_cast<size_t>(count); ++checked_, checked_end_ = used_)
      if (!take(Part::kMessage, body)) return false;
    bodies.reserve(checked_);
    for (; at < used_; at += 4 + bodies.back().size())
      bodies.emplace_back(input_.data() + at + 4, get_be<uint32_t>(input_.data() + at));
    return true;
  }
  bool publish(Topic* topic, const std::string_view* bodies, size_t count, int64_t delay) {
    if (topic == nullptr) return false;
    const Status status = topic->publish(bodies, count, delay);
    if (!status.ok()) return fail("E_", word_[0], "_FAILED ", word_[0], " failed ", status.error);
    if (!is_last(topic->name)) last_ = {topic, &published_[topic->name], broker_.deletions};
    *last_.published += count;
    return respond("OK");
  }

  // ---- time ---------------------------------------------------------------------------------------------------------

  int64_t read_deadline() const { return saturating_add(last_command_, saturating_add(heartbeat_, heartbeat_)); }
  /// One timer for that and the heartbeat, up to a quarter of the interval after its time: so clients who come at any time
  /// share few turns of the loop, where a thousand of them would take 3 % of a core.
  void set_timer() {
    int64_t grain = kSecond / 8;
    while (grain < std::min(beat_, heartbeat_) / 8) grain *= 2;
    timer_.set(saturating_add(std::min(next_heartbeat_, read_deadline()), grain - 1) / grain * grain);
  }
  void on_timer() {
    const int64_t now = broker_.now.steady;
    if (parked) last_command_ = now;  // it is not the client who is waited for
    late = now >= read_deadline();
    if (late) broker_.logger.say(Level::kError, "client(", about_.remote_address, ") - i/o timeout");
    if (late) return port.attend();
    if (now >= next_heartbeat_) {
      if (!port.out.empty() && written == written_before_) port.dropped = true;  // nothing went out meanwhile
      written_before_ = written;
      next_heartbeat_ = std::max(saturating_add(next_heartbeat_, beat_), now);
      if (magic_seen_) respond("_heartbeat_");
    }
    set_timer();
  }

  Host& host_;
  Broker& broker_;
  const std::string ip_;
  ClientStats about_;  // all but what its consumer, its grant and published_ know
  const int64_t connected_ = broker_.now.steady;
  std::map<std::string, uint64_t> published_;  // messages per topic
  struct {
    Topic* topic = nullptr;  // of the last publish; there as long as no topic was deleted since
    uint64_t* published = nullptr;
    uint64_t deletions = 0;
  } last_;
  // What IDENTIFY sets, times in nanoseconds.
  int64_t heartbeat_ = 30 * kSecond, msg_timeout_ = broker_.options.msg_timeout.count(), sample_rate_ = 0;
  int64_t buffer_size_ = 16384, buffer_timeout_ = broker_.options.output_buffer_timeout.count();
  // What the first one sets for good, for deliveries and heartbeats.
  bool identified_ = false;
  Consumer::Distance distance_ = Consumer::kElsewhere;
  int64_t beat_ = heartbeat_, delivery_timeout_ = msg_timeout_, delivery_sample_rate_ = 0;
  int64_t last_command_ = connected_, next_heartbeat_ = connected_ + beat_;  // when it was done with; when it is due
  uint64_t written_before_ = std::numeric_limits<uint64_t>::max();  // at the last heartbeat; `written` is never so much
  std::string secret_;
  std::shared_ptr<const AuthGrant> grant_;
  bool magic_seen_ = false, auth_failed_ = false, auth_done_ = false, final_ = false;  // final: no more input will come
  // The command at hand: from its line on, how much of that is used, and the words of the line.
  std::string_view input_;
  size_t used_ = 0, words_ = 0;
  std::array<std::string_view, 4> word_;
  size_t needed_ = 0;                     // so many bytes, to try it again; 0: it is done with
  size_t checked_ = 0, checked_end_ = 0;  // how many messages of a half-arrived MPUB were looked at, and where they end
  Timer timer_{broker_.timers, [this] { on_timer(); }};
};

// ---------------------------------------------------------------------------------------------------------------------
// [10] Statistics
//
// One snapshot, and four ways to print it: JSON and text for GET /stats, lines for statsd, metrics for Prometheus.
// Always: what prints sees the snapshot alone, and uses nsqd's names in nsqd's order and widths.
// ---------------------------------------------------------------------------------------------------------------------

struct StatsQuery {
  std::string topic, channel;  // empty: all
  bool include_clients = true, include_memory = true;
};

inline Stats take_stats(const Host& host, const StatsQuery& query) {
  const Broker& broker = host.broker;
  const auto latency = [&](LatencySketch& of) {
    return of.stats(broker.options.e2e_processing_latency_percentile, broker.now.steady);
  };
  Stats stats{broker.storage.health(), host.started_wall / kSecond, {}, {}};
  for (const auto& [name, topic] : broker.topics) {
    const bool wanted = query.topic.empty() || query.topic == name;
    if (!wanted || (!query.channel.empty() && topic->find(query.channel) == nullptr)) continue;
    TopicStats shown{name, topic->depth(), topic->backend_depth(), topic->message_count, topic->message_bytes,
                     topic->paused, {}, {}};
    LatencySketch merged(broker.options.e2e_processing_latency_window_time.count());
    for (const auto& [channel_name, of] : topic->channels) {
      if (!query.channel.empty() && query.channel != channel_name) continue;
      ChannelStats& channel = shown.channels.emplace_back(ChannelStats{
          channel_name, of->depth(), of->backend_depth(), of->in_flight_count(), of->deferred_count(),
          of->message_count(), of->requeue_count, of->timeout_count, of->sent_to[Consumer::kSameZone],
          of->sent_to[Consumer::kSameRegion], of->sent_to[Consumer::kElsewhere],
          static_cast<int64_t>(of->consumers.size()), {}, of->paused, {}});
      for (const auto& consumer : of->consumers)
        if (query.include_clients) channel.clients.push_back(consumer->port->session->stats());
      if (of->latency == nullptr) continue;
      channel.latency = latency(*of->latency);
      merged.merge(*of->latency, broker.now.steady);
    }
    if (!shown.channels.empty()) shown.latency = latency(merged);
    stats.topics.push_back(std::move(shown));
  }
  if (!query.include_clients) return stats;
  host.each_session([&stats](const Session& session) {
    ClientStats client = session.stats();
    if (!client.pub_counts.empty()) stats.producers.push_back(std::move(client));
  });
  return stats;
}

/// Numbers under nsqd's names, in the order of its JSON.
using Figures = std::vector<std::pair<std::string_view, int64_t>>;

inline Figures figures_of(const TopicStats& of) {
  return {{"depth", of.depth}, {"backend_depth", of.backend_depth}, {"message_count", of.message_count},
          {"message_bytes", of.message_bytes}};
}
inline Figures figures_of(const ChannelStats& of) {
  return {{"depth", of.depth}, {"backend_depth", of.backend_depth}, {"in_flight_count", of.in_flight_count},
          {"deferred_count", of.deferred_count}, {"message_count", of.message_count},
          {"zone_local_msg_count", of.zone_local_count}, {"region_local_msg_count", of.region_local_count},
          {"global_msg_count", of.global_count}, {"requeue_count", of.requeue_count},
          {"timeout_count", of.timeout_count}, {"client_count", of.client_count}};
}
/// What nsqd shows in JSON only, and there only while it is not 0.
inline bool is_regional(std::string_view figure) { return ends_with(figure, "_msg_count"); }

/// nsqd's names for Go's memory figures. Here: what the process has to itself, and 0 for what only a collector has.
inline Figures memory_figures() {
  long long resident = 0, shared = 0;
  if (std::FILE* statm = std::fopen("/proc/self/statm", "r")) {
    if (std::fscanf(statm, "%*d %lld %lld", &resident, &shared) != 2) resident = shared = 0;
    std::fclose(statm);
  }
  return {{"heap_objects", 0}, {"heap_idle_bytes", 0},
          {"heap_in_use_bytes", (resident - shared) * ::sysconf(_SC_PAGESIZE)}, {"heap_released_bytes", 0},
          {"gc_pause_usec_100", 0}, {"gc_pause_usec_99", 0}, {"gc_pause_usec_95", 0}, {"next_gc_bytes", 0},
          {"gc_total_runs", 0}};
}

/// GET /stats?format=json. Each write() adds an item of a list.
struct StatsJson {
  const StatsQuery& query;
  JsonWriter json = {};

  template <typename Items>
  void list(std::string_view key, const Items& items, bool null) {
    json.key(key);
    if (null) return void(json.raw("null"));
    json.open('[');
    for (const auto& item : items) write(item);
    json.close(']');
  }
  void figures(const Figures& figures) {
    for (const auto& [name, value] : figures)
      if (value != 0 || !is_regional(name)) json.member(name, value);
  }
  template <typename Name, typename Value>
  void write(const std::pair<Name, Value>& of) {
    constexpr bool kQuantile = std::is_same_v<Name, double>;  // else one of pub_counts
    json.open('{').member(kQuantile ? "quantile" : "topic", of.first);
    json.member(kQuantile ? "value" : "count", of.second).close('}');
  }
  void write(const ClientStats& of) {
    json.open('{').member("client_id", of.client_id).member("hostname", of.hostname).member("version", "V2");
    json.member("remote_address", of.remote_address);
    figures({{"state", of.state}, {"ready_count", of.ready_count}, {"in_flight_count", of.in_flight_count},
             {"message_count", of.message_count}, {"finish_count", of.finish_count},
             {"requeue_count", of.requeue_count}, {"connect_ts", of.connected_at}, {"sample_rate", of.sample_rate}});
    json.member("deflate", false).member("snappy", false).member("user_agent", of.user_agent);
    if (of.authed) json.member("authed", true);
    if (!of.auth_identity.empty()) json.member("auth_identity", of.auth_identity);
    if (!of.auth_identity_url.empty()) json.member("auth_identity_url", of.auth_identity_url);
    json.member("topology_zone", of.topology_zone).member("topology_region", of.topology_region);
    decltype(of.pub_counts) counts;
    for (const auto& count : of.pub_counts)
      if (query.topic.empty() || query.topic == count.first) counts.push_back(count);
    if (!counts.empty()) list("pub_counts", counts, false);
    json.member("tls", false).member("tls_cipher_suite", "").member("tls_version", "");
    json.member("tls_negotiated_protocol", "").member("tls_negotiated_protocol_is_mutual", false).close('}');
  }
  void write(const ChannelStats& of) {
    json.open('{').member("channel_name", of.name);
    figures(figures_of(of));
    list("clients", of.clients, !query.include_clients);
    end(of.paused, of.latency);
  }
  void write(const TopicStats& of) {
    json.open('{').member("topic_name", of.name);
    list("channels", of.channels, false);
    figures(figures_of(of));
    end(of.paused, of.latency);
  }
  void end(bool paused, const LatencyStats& latency) {
    json.member("paused", paused).key("e2e_processing_latency").open('{').member("count", latency.count);
    list("percentiles", latency.percentiles, latency.percentiles.empty());
    json.close('}').close('}');
  }
};

inline std::string stats_json(const Stats& stats, const StatsQuery& query, bool topic_known) {
  StatsJson shown{query};
  shown.json.open('{').member("version", kProtocolVersion).member("health", stats.health);
  shown.json.member("start_time", stats.start_time);
  shown.list("topics", stats.topics, !topic_known);
  if (query.include_memory) {
    shown.json.key("memory").open('{');
    shown.figures(memory_figures());
    shown.json.close('}');
  }
  shown.list("producers", stats.producers, stats.producers.empty());
  return shown.json.close('}').out;
}

inline std::string build_text() {
  return text("nsqd v", kProtocolVersion, " (nsqd.hpp ", kVersion, ", built w/C++", __cplusplus / 100 % 100, ")");
}

/// A label, and its value filled up to a width.
template <typename Value>
std::string column(std::string_view label, const Value& value, size_t width) {
  const std::string shown = text(value);
  return text(label, shown, std::string(width - std::min(width, shown.size()), ' '));
}

inline std::string latency_text(const LatencyStats& latency) {
  std::string shown;
  for (const auto& [quantile, nanoseconds] : latency.percentiles) {
    auto value = static_cast<double>(nanoseconds);
    size_t unit = 0;
    for (; value > 1000 && unit < 3; ++unit) value /= 1000;
    std::array<char, 40> number{};
    std::snprintf(number.data(), number.size(), "%.1f%.1ss", value, &"num"[unit]);
    shown += text(shown.empty() ? "" : ", ", number.data());
  }
  return shown;
}

inline std::string client_text(const ClientStats& of) {
  const size_t colon = of.remote_address.rfind(':');  // a Unix socket has no port
  const std::string port = colon == std::string::npos ? "" : of.remote_address.substr(colon + 1);
  const std::string name = text(of.hostname, ":", port, of.user_agent.empty() ? "" : " ", of.user_agent);
  std::string figures = text(" state: ", of.state, column(" inflt: ", of.in_flight_count, 4),
                             column(" rdy: ", of.ready_count, 4), column(" fin: ", of.finish_count, 8),
                             column(" re-q: ", of.requeue_count, 8), column(" msgs: ", of.message_count, 8));
  uint64_t total = 0;
  std::string topics;
  for (const auto& [topic, count] : of.pub_counts) {
    topics += text(topics.empty() ? " topics: " : ",", topic, "=", count);
    figures = column(" msgs: ", total += count, 8) + topics;
  }
  const std::string connected = duration_text(of.connected_for / kSecond * kSecond);
  return text(column("[V2 ", name, 21), "]", figures, " connected: ", connected, "\n");
}

inline std::string topic_text(const TopicStats& topic) {
  std::string out = text(topic.paused ? "\n*P " : "\n   ", column("[", topic.name, 15),
                         column("] depth: ", topic.depth, 5), column(" be-depth: ", topic.backend_depth, 5),
                         column(" msgs: ", topic.message_count, 8), " e2e%: ", latency_text(topic.latency), "\n");
  for (const ChannelStats& of : topic.channels) {
    out += text(of.paused ? "   *P " : "      ", column("[", of.name, 25), column("] depth: ", of.depth, 5),
                column(" be-depth: ", of.backend_depth, 5), column(" inflt: ", of.in_flight_count, 4),
                column(" def: ", of.deferred_count, 4), column(" re-q: ", of.requeue_count, 5),
                column(" timeout: ", of.timeout_count, 5), column(" msgs: ", of.message_count, 8),
                " e2e%: ", latency_text(of.latency), "\n");
    for (const ClientStats& client : of.clients) out += "        " + client_text(client);
  }
  return out;
}

inline std::string stats_text(const Stats& stats, const StatsQuery& query, const Now& now, int64_t started_wall) {
  const auto started = static_cast<time_t>(stats.start_time);
  tm utc{};
  const std::string start = time_text("%Y-%m-%dT%H:%M:%SZ", *::gmtime_r(&started, &utc));
  const std::string uptime = duration_text(std::max<int64_t>(0, now.wall - started_wall));
  std::string out = text(build_text(), "\nstart_time ", start, "\nuptime ", uptime, "\n\nHealth: ", stats.health, "\n");
  if (query.include_memory) out += "\nMemory:\n";
  for (const auto& [name, figure] : query.include_memory ? memory_figures() : Figures())
    out += text(column("   ", name, 25), "\t", figure, "\n");
  out += stats.topics.empty() ? "\nTopics: None\n" : "\nTopics:";
  for (const TopicStats& topic : stats.topics) out += topic_text(topic);
  out += stats.producers.empty() ? "\nProducers: None\n" : "\nProducers:\n";
  for (const ClientStats& client : stats.producers) out += "   " + client_text(client);
  return out;
}

/// The metrics of one push to statsd, and what the next one has to subtract.
class StatsdFeed {
 public:
  /// Packets of whole lines, none longer than the options have it unless a single line is.
  std::vector<std::string> packets(const Stats& stats, const Options& options) {
    const auto hidden = [&](const std::string& name) { return options.statsd_exclude_ephemeral && is_ephemeral(name); };
    for (const TopicStats& topic : stats.topics) {
      if (hidden(topic.name)) continue;
      const std::string name = text(options.statsd_prefix, "topic.", topic.name, ".");
      add(name, figures_of(topic), topic.latency);
      for (const ChannelStats& of : topic.channels)
        if (!hidden(of.name)) add(text(name, "channel.", of.name, "."), figures_of(of), of.latency);
    }
    if (options.statsd_mem_stats) add(options.statsd_prefix + "mem.", memory_figures(), {});
    last_ = std::exchange(counted_, {});
    std::vector<std::string> packets;
    for (const std::string& line : std::exchange(lines_, {})) {
      const size_t size = packets.empty() ? 0 : packets.back().size() + line.size();
      if (size == 0 || static_cast<int64_t>(size) > options.statsd_udp_packet_size) packets.emplace_back();
      packets.back() += line;
    }
    return packets;
  }

 private:
  /// A counter is sent as what was added since the last push: less than nothing where a topic was made anew.
  void add(const std::string& of, const Figures& figures, const LatencyStats& latency) {
    static constexpr std::string_view kCounters = "message_count message_bytes requeue_count timeout_count gc_runs";
    for (auto [key, value] : figures) {
      if (is_regional(key)) continue;
      key = key == "client_count" ? "clients" : key == "gc_total_runs" ? "gc_runs" : key;
      const bool counter = kCounters.find(key) != kCounters.npos;
      const std::string name = text(of, key);
      if (counter) counted_[name] = std::exchange(value, value - last_[name]);
      lines_.push_back(text(name, ":", value, counter ? "|c\n" : "|g\n"));
    }
    for (const auto& [quantile, value] : latency.percentiles)
      lines_.push_back(text(of, "e2e_processing_latency_", std::lround(quantile * 100), ":", value, "|g\n"));
  }

  std::vector<std::string> lines_;
  std::map<std::string, int64_t> last_, counted_;
};

/// The metrics of GET /metrics, in the text format of Prometheus. No name of a topic or channel needs an escape there.
inline std::string metrics_text(const Stats& stats, size_t connections) {
  std::map<std::string, std::string> families;  // each has its head once, and all its lines behind it
  const auto add = [&](const std::string& name, std::string_view help, auto value, const std::string& labels = {}) {
    const auto type = ends_with(name, "_total") ? "counter" : ends_with(name, "latency_seconds") ? "summary" : "gauge";
    std::string& family = families[name];
    if (family.empty()) family = text("# HELP ", name, " ", help, "\n# TYPE ", name, " ", type, "\n");
    family += text(name, labels.empty() ? "" : "{" + labels + "}", " ", JsonWriter().value(value).out, "\n");
  };
  const std::string versions = text("version=\"", kVersion, "\",protocol_version=\"", kProtocolVersion, "\"");
  add("nsqd_info", "the daemon that answers", 1, versions);
  add("nsqd_healthy", "1, or 0 when the disk fails", stats.health == "OK" ? 1 : 0);
  add("nsqd_connections", "open connections of all kinds", connections);
  const double seconds = static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
  add("process_cpu_seconds_total", "time that the process has used a processor", seconds);
  add("process_start_time_seconds", "when the process started, Unix time", stats.start_time);
  add("process_memory_in_use_bytes", "memory of the process's own", memory_figures()[2].second);
  for (const TopicStats& topic : stats.topics) {
    const std::string labels = text("topic=\"", topic.name, "\"");
    add("nsqd_topic_messages_total", "messages published to the topic", topic.message_count, labels);
    add("nsqd_topic_message_bytes_total", "bytes of their bodies", topic.message_bytes, labels);
    add("nsqd_topic_depth", "messages not handed to a channel yet", topic.depth, labels);
    add("nsqd_topic_paused", "1 when the topic is paused", topic.paused ? 1 : 0, labels);
    for (const ChannelStats& of : topic.channels) {
      const std::string both = text(labels, ",channel=\"", of.name, "\"");
      add("nsqd_channel_messages_total", "messages that the channel was given", of.message_count, both);
      add("nsqd_channel_requeued_total", "messages that consumers gave back", of.requeue_count, both);
      add("nsqd_channel_timed_out_total", "messages whose time ran out", of.timeout_count, both);
      add("nsqd_channel_depth", "messages that wait", of.depth, both);
      add("nsqd_channel_in_flight", "messages with a consumer", of.in_flight_count, both);
      add("nsqd_channel_deferred", "messages put off", of.deferred_count, both);
      add("nsqd_channel_clients", "consumers", of.client_count, both);
      add("nsqd_channel_paused", "1 when the channel is paused", of.paused ? 1 : 0, both);
      for (const auto& [quantile, value] : of.latency.percentiles)
        add("nsqd_channel_latency_seconds", "time from publish to finish, by quantile, over the window",
            static_cast<double>(value) / 1e9, text(both, ",quantile=\"", JsonWriter().value(quantile).out, "\""));
    }
  }
  std::string all;
  for (const auto& [name, family] : families) all += family;
  return all;
}

// ---------------------------------------------------------------------------------------------------------------------
// [11] The page
//
// What a browser gets at GET /: one page, with nothing to load besides it, that shows /stats and calls the HTTP API.
// Always: a name, or any other word of a client, gets into the page as text, never as mark-up.
// ---------------------------------------------------------------------------------------------------------------------

/// What the page may do: run its own script and style, and speak to this daemon, nothing else.
inline constexpr std::string_view kPagePolicy =
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

inline constexpr std::string_view kPage = R"page(<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>nsqd</title><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --page: light-dark(#f6f7f7, #131618); --card: light-dark(#fff, #1b1f22);
  --ink: light-dark(#1c2326, #e4e8e9); --soft: light-dark(#5c676c, #98a4a9); --line: light-dark(#e3e7e8, #2b3135);
  --good: light-dark(#0b7468, #4fc4b3); --warn: light-dark(#96590a, #e5b567); --bad: light-dark(#b3261e, #f2938c);
  font: 14px/1.45 system-ui, sans-serif; font-variant: tabular-nums; background: var(--page); color: var(--ink) }
* { box-sizing: border-box; margin: 0; overflow-wrap: anywhere }
body { display: grid; grid: auto / minmax(0, 1fr); gap: 16px; max-width: 1360px; margin: auto; padding: 20px 24px 72px }
header, .bar { display: flex; flex-wrap: wrap; align-items: baseline; gap: 8px 12px } h1, h2 { font-size: 20px }
header span, label, td button, td::before, .clients { color: var(--soft) } #filter { flex: 1; min-width: 0 }
table, dialog, .note, button, input, textarea { border: 1px solid var(--line); border-radius: 8px; padding: 7px 14px;
  background: var(--card); color: var(--ink); font: inherit }
button:hover { border-color: var(--soft) } :focus-visible { outline: 2px solid var(--good); outline-offset: 1px }
.main { background: var(--good); color: var(--card) } .delete .main, .empty .main { background: var(--bad) }
tr { display: grid; grid: auto / minmax(0, 1fr) 136px repeat(5, 70px) 80px repeat(3, 58px) 190px; align-items: center;
  padding: 3px 0; text-align: right } th { text-align: left; font-weight: inherit }
td::before { content: attr(title) " "; font-size: 12px; font-weight: 400 } [scope] ~ td::before { display: none }
#head { align-items: end; font-weight: 600 } #head td::before { display: block }
.topic { border-top: 1px solid var(--line) } .topic th { font-weight: 600 } .topic .do { grid-column: -4 / -1 }
[scope] ~ .zero { opacity: .5 } .timeout_count:not(.zero), i, #problem { color: var(--warn) }
td button { border-color: transparent; background: none; padding: 3px 5px; font-size: 13px; white-space: nowrap }
svg { height: 24px; width: 120px; vertical-align: bottom; border-bottom: 1px solid var(--line); fill: var(--good) }
.do { display: flex; justify-content: end; margin-right: -5px }
details { display: inline-block } summary { cursor: pointer }
.clients { grid-column: 1 / -1; padding: 2px 0 8px 15px; text-align: left; white-space: pre-line }
dialog { width: min(440px, 92%); margin: auto; padding: 22px } dialog .bar { justify-content: end }
form { display: grid; gap: 14px } label > * { display: block; width: 100%; margin-top: 3px }
#toast { position: fixed; inset: auto 16px 16px; margin: auto; width: fit-content; background: var(--ink);
  color: var(--page); animation: fade 6s forwards } @keyframes fade { 95% { opacity: 1 } to { visibility: hidden } }
@media (max-width: 1180px) { body { padding-inline: 12px } td:empty, [scope] ~ .zero:not(.depth) { display: none }
  tr { display: flex; flex-wrap: wrap; gap: 2px 14px; padding: 7px 0; text-align: left } th { flex: 1 1 50% }
  [scope] ~ td::before { display: inline } .do { margin-left: auto } #head th, .clients { flex: 1 0 100% } }
[hidden], .note:empty, label:has(:disabled), form:not(.delete, .empty) p, tr:not(.paused) i, .channel .topics,
.topic :is(.out, .client_count), tr:not(:has([open])) .clients { display: none !important }
</style>
<header><h1>nsqd</h1><span id="about"></span></header><p id="problem" class="note" role="alert"></p>
<div class="bar"><input id="filter" type="search" placeholder="Filter by name" aria-label="Filter by name">
  <button data-do="create" aria-label="Create a topic">Create</button>
  <button data-do="pub" aria-label="Publish a message" class="main">Publish</button></div>
<table><tbody id="list"><tr id="head"><th id="sizes"></th><td title="Depth, 3 minutes"></td><td></td><td></td></table>
<p id="none" class="note"></p><p id="toast" class="note" role="status"></p>
<template id="row"><tr><th scope="row"><details><summary></summary></details> <i>paused</i></th>
  <td><svg preserveAspectRatio="none" role="img" aria-label="Depth over 3 minutes"><polygon /></svg></td>
  <td class="do"><button data-do="pub" class="topics" aria-label="Publish to">Publish</button>
  <button data-do="create" class="topics" aria-label="Create a channel of">Channel</button>
  <button data-do="pause" class="pause" aria-label="Pause">Pause</button>
  <button data-do="empty" aria-label="Empty">Empty</button><button data-do="delete" aria-label="Delete">Delete</button>
  <td class="clients"></template>
<dialog id="dialog" aria-labelledby="title"><form id="form"><h2 id="title"></h2><p>What it holds will be lost.</p>
  <label>Topic<input name="topic" required maxlength="64" pattern="[.a-zA-Z0-9_\-]+(#ephemeral)?"></label>
  <label>Channel<input name="channel" required maxlength="64" pattern="[.a-zA-Z0-9_\-]+(#ephemeral)?"></label>
  <label>Message<textarea name="body" rows="4" required></textarea></label><div class="bar">
  <button type="button" data-do="close">Cancel</button><button class="main" id="go"></button></div></form></dialog>
<script>
const COLUMNS = { depth: 'Depth', in_flight_count: 'In flight', deferred_count: 'Deferred', requeue_count: 'Requeued',
  timeout_count: 'Timed out', message_count: 'Messages', in: 'In/s', out: 'Out/s', client_count: 'Clients' };
const $ = id => document.getElementById(id), rows = () => [...$('list').children].slice(1);  // all but the head
const count = n => Number(n.toFixed(n < 10 ? 1 : 0)).toLocaleString('en');
const set = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const client = c => [c.client_id, c.remote_address, c.user_agent, `ready ${c.ready_count}`,
  `in flight ${c.in_flight_count}`, `finished ${c.finish_count}`, `requeued ${c.requeue_count}`].join(', ');
const watch = new IntersectionObserver(changes => {  // what is out of sight is not drawn: 200 topics cost little
  for (const { target: row, isIntersecting } of changes) if ((row.seen = isIntersecting)) draw(row);
});

function fill(row, data) {
  for (const key in COLUMNS) {
    const cell = row[key] ??= Object.assign(row.insertCell(row.cells.length - 2), { title: COLUMNS[key] });
    cell.className = data[key] ? key : `${key} zero`;
    set(cell, key in data ? count(data[key]) : '');
  }
}
function addRow(id, place) {
  const row = $('row').content.firstElementChild.cloneNode(true), [topic, channel] = id.split('/');
  Object.assign(row, { id, past: [], names: channel ? { topic, channel } : { topic } });
  row.className = channel ? 'channel' : 'topic';
  if (channel) row.querySelector('summary').append(channel);
  else row.querySelector('details').replaceWith(topic);
  for (const button of row.querySelectorAll('button'))
    button.ariaLabel += (channel ? ` channel ${channel} of` : '') + ` topic ${topic}`;
  place.after(row);
  watch.observe(row);
  return row;
}
function update(row, data, now) {
  const held = data.depth + (data.in_flight_count ?? 0) + (data.deferred_count ?? 0), arrived = data.message_count;
  const left = arrived - held, { past } = row;  // what left was finished or emptied
  past.push({ at: now, depth: data.depth, arrived, left });
  if (past[0].at < now - 180e3) past.shift();
  const old = past.findLast(p => p.at < now - 5000) ?? past[0], rate = n => Math.max(0, n * 1000 / (now - old.at || 1));
  row.data = { ...data, in: rate(arrived - old.arrived), out: rate(left - old.left) };
  if (row.seen) draw(row);
}
function draw(row) {
  const { data, past } = row, find = selector => row.querySelector(selector), pause = find('.pause');
  const high = Math.max(5, ...past.map(p => p.depth)), x = p => (p.at - past.at(-1).at) / 1000;
  fill(row, data);
  find('svg').setAttribute('viewBox', `-180 ${-high} 180 ${high}`);
  find('polygon').setAttribute('points', `${x(past[0])},0 ${past.map(p => `${x(p)},${-p.depth}`).join(' ')} 0,0`);
  row.classList.toggle('paused', data.paused);
  pause.dataset.do = data.paused ? 'unpause' : 'pause';
  set(pause, data.paused ? 'Unpause' : 'Pause');
  pause.ariaLabel = pause.ariaLabel.replace(/^\w+/, pause.textContent);
  if (data.clients) set(find('.clients'), data.clients.map(client).join('\n') || 'No client is subscribed.');
}
function render(stats, now) {
  let place = $('head');
  for (const topic of stats.topics) for (const data of [topic, ...topic.channels]) {
    const id = `${topic.topic_name}/${data.channel_name ?? ''}`;  // no name holds a slash
    place = $(id) ?? addRow(id, place);
    update(place, data, now);
  }
  for (const row of rows()) if (row.past.at(-1).at !== now) row.remove();
  const topics = rows().filter(row => !row.names.channel), channels = rows().filter(row => row.names.channel);
  const counted = { depth: rows(), in: topics, message_count: topics }, total = {};  // the others: in channels
  for (const key in COLUMNS) total[key] = (counted[key] ?? channels).reduce((sum, row) => sum + row.data[key], 0);
  fill($('head'), total);
  set($('sizes'), `${topics.length} topics, ${channels.length} channels`);
  const start = new Date(stats.start_time * 1000).toLocaleString();
  set($('about'), `${location.host}, version ${stats.version}, health ${stats.health}, up since ${start}`);
  set($('problem'), stats.health === 'OK' ? '' : stats.health);
  set($('none'), topics.length ? '' : `Nothing here yet. Try: curl -d hello '${location.origin}/pub?topic=clicks'`);
  filter();
}
function filter() {
  const wanted = $('filter').value.trim().toLowerCase();
  for (const row of rows()) row.hidden = !row.id.toLowerCase().includes(wanted);
  for (const row of rows()) if (!row.hidden) $(`${row.names.topic}/`).hidden = false;
}
async function act(verb, label, { body, ...names }) {
  const path = verb === 'pub' ? verb : `${names.channel ? 'channel' : 'topic'}/${verb}`;
  const answer = await fetch(`${path}?${new URLSearchParams(names)}`, { method: 'POST', body }).catch(() => null);
  if (answer?.ok) $('dialog').close();
  ($('dialog').open ? $('dialog') : document.body).append($('toast'));  // in sight, and shown anew
  set($('toast'), `${label}: ${answer?.ok ? 'done' : answer ? (await answer.json()).message : 'nsqd does not answer'}`);
  live();
}
function ask(verb, label, row) {
  const form = $('form'), { topic, channel, body } = form.elements;
  form.reset();
  form.className = verb;
  topic.disabled = row !== null;  // what is disabled is not shown
  channel.disabled = row === null || verb !== 'create';
  body.disabled = verb !== 'pub';
  set($('title'), label);
  set($('go'), label.split(' ')[0]);
  form.onsubmit = () => {
    act(verb, label, { ...row?.names, ...Object.fromEntries(new FormData(form)) });
    return false;
  };
  $('dialog').showModal();
}
document.onclick = ({ target }) => {
  const verb = target.dataset.do, label = target.ariaLabel, row = target.closest('tr');
  if (verb === 'close') $('dialog').close();
  else if (verb === 'pause' || verb === 'unpause') act(verb, label, row.names);
  else if (verb) ask(verb, label, row);
};
async function live() {
  const clients = document.querySelector('details[open]') !== null, signal = AbortSignal.timeout(5000);
  try {
    const answer = await fetch(`stats?format=json&include_mem=false&include_clients=${clients}`, { signal });
    render(await answer.json(), Date.now());
  } catch (e) {
    set($('problem'), `nsqd does not answer (${e.message}). What is below is old; asking again every second.`);
  }
}
$('filter').oninput = filter;
$('list').addEventListener('toggle', live, true);
setInterval(live, 1000);
live();
</script>
)page";

// ---------------------------------------------------------------------------------------------------------------------
// [12] HTTP
//
// A server for HTTP/1.1 and 1.0: keep-alive, pipelining, chunked bodies, Expect: 100-continue; then nsqd's endpoints,
// one row each in one table.
// Always: requests are answered in their order; nothing of a request is acted on before all of it has arrived.
// ---------------------------------------------------------------------------------------------------------------------

/// Takes what comes before the first `separator` off the front of `rest`, and the separator with it.
inline std::string_view cut(std::string_view& rest, char separator) {
  const std::string_view part = take_front(rest, rest.find(separator));
  rest.remove_prefix(rest.empty() ? 0 : 1);
  return part;
}

/// Nothing where an escape is broken. + is a blank, as in a query: no path of ours has either.
inline std::optional<std::string> percent_decoded(std::string_view encoded) {
  std::string plain(take_front(encoded, encoded.find_first_of("%+")));
  while (!encoded.empty()) {
    const std::string_view piece = take_front(encoded, encoded[0] == '%' ? 3 : 1);
    const auto byte = piece.size() == 3 ? decimal(piece.substr(1), false, 16) : std::nullopt;
    if (piece[0] == '%' && !byte) return std::nullopt;
    plain += byte ? static_cast<char>(*byte) : piece[0] == '+' ? ' ' : piece[0];
  }
  return plain;
}
inline std::string percent_encoded(std::string_view plain) {
  std::string encoded;  // what names are made of needs no escape
  for (char c : plain) encoded += valid_name({&c, 1}) ? std::string(1, c) : hex_escape("%", static_cast<uint8_t>(c), 2);
  return encoded;
}

/// Names and values: the headers of a message, by name in lower case, or the parameters of a query.
struct HttpFields {
  std::map<std::string, std::string, std::less<>> values = {};

  std::optional<std::string_view> get(std::string_view name) const {
    const auto found = values.find(name);
    return found == values.end() ? std::nullopt : std::optional<std::string_view>(found->second);
  }
  /// Whether the value is a list with this word in it.
  bool has(std::string_view name, std::string_view word) const {
    for (std::string_view rest = get(name).value_or(""); !rest.empty();)
      if (same_word(trimmed(cut(rest, ',')), word)) return true;
    return false;
  }
  bool wanted(std::string_view name) const { return get(name) != "false" && get(name) != "0"; }
  /// Takes the lines of a head but for its first; false where one is no header. One that comes twice gets a comma.
  bool parse(std::string_view lines) {
    while (!lines.empty()) {
      std::string_view line = cut(lines, '\n');
      if (line.empty() || line == "\r") continue;
      const std::string_view name = take_front(line, line.find_first_of(" \t\"(),/:;<=>?@[\\]{}"));
      if (name.empty() || line.substr(0, 1) != ":") return false;
      const auto [header, first] = values.try_emplace(lower(name), trimmed(line.substr(1)));
      if (!first) header->second += text(",", trimmed(line.substr(1)));
    }
    return true;
  }
};

/// Appends the chunks of a body (RFC 9112, 7.1), each once it is there whole. Extensions and trailers are passed over.
enum class Chunks { kMore, kDone, kBad };
inline Chunks take_chunks(std::string_view& input, std::string& body, size_t most) {
  static constexpr size_t kMostFraming = 4096;  // bytes of a chunk that are not data
  for (;;) {
    std::string_view rest = input, data;
    const auto more = [&] { return input.size() - data.size() > kMostFraming ? Chunks::kBad : Chunks::kMore; };
    if (rest.find('\n') == rest.npos) return more();
    std::string_view line = cut(rest, '\n');
    const auto size = decimal(trimmed(cut(line, ';')), false, 16);
    if (!size || static_cast<size_t>(*size) > most - body.size()) return Chunks::kBad;
    data = take_front(rest, static_cast<size_t>(*size));
    do {  // the end of the data's line; behind the last chunk, which has none, trailers and an empty line
      if (rest.find('\n') == rest.npos) return more();
      line = trimmed(cut(rest, '\n'));
    } while (data.empty() && !line.empty());
    if (!line.empty()) return Chunks::kBad;
    body += data;
    input = rest;
    if (data.empty()) return Chunks::kDone;
  }
}

/// A request: parse takes its head, the session adds the body.
struct HttpRequest {
  std::string method, target, path, body;
  HttpFields headers, parameters;  // of parameters with one name, the first
  bool query_valid = true, old = false, keep_alive = true, chunked = false;  // old: HTTP/1.0
  size_t length = 0;  // of the body, as far as it is not taken yet

  /// Reads the request line and the headers. Returns the status of the refusal where they are wrong, else 0. Where they
  /// tell twice where the request ends or for whom it is, something may be smuggled past a proxy: there is no guessing.
  int parse(std::string_view head) {
    std::string_view line = trimmed(cut(head, '\n'));
    method = cut(line, ' ');
    std::string_view rest = cut(line, ' ');
    if (line.size() != 8 || line.substr(0, 5) != "HTTP/" || !headers.parse(head)) return 400;
    if (line.substr(5, 2) != "1." || !decimal(line.substr(7))) return 505;
    old = line.back() == '0';
    if (rest.substr(0, 7) == "http://") rest.remove_prefix(std::min(rest.find('/', 7), rest.size()));  // as to a proxy
    target = rest;
    const auto decoded = percent_decoded(cut(rest, '?'));
    if (!decoded || (target != "*" && target[0] != '/') || target.find('\r') != target.npos) return 400;
    path = *decoded;
    query_valid = rest.find(';') == rest.npos;  // as Go has it
    while (!rest.empty()) {
      std::string_view pair = cut(rest, '&');
      const auto name = percent_decoded(cut(pair, '=')), value = percent_decoded(pair);
      query_valid = query_valid && name && value;
      if (query_valid) parameters.values.try_emplace(*name, *value);
    }
    keep_alive = old ? headers.has("connection", "keep-alive") : !headers.has("connection", "close");
    const auto size = headers.get("content-length"), coding = headers.get("transfer-encoding");
    if (const auto host = headers.get("host"); host ? host->find(',') != host->npos : !old) return 400;
    const auto number = size ? decimal(*size) : 0;
    length = static_cast<size_t>(number.value_or(0));
    chunked = coding.has_value();
    if (!number || (chunked && size)) return 400;
    return chunked && !same_word(*coding, "chunked") ? 501 : 0;
  }
};

/// A setting as GET /config shows it, and the change of one; defined with the table of flags in [16].
struct ShownOption {
  std::string value;
  bool json = true;
};
inline std::optional<ShownOption> show_option(const Options& options, std::string_view key);
inline std::optional<Level> parse_level(std::string_view word);

class HttpSession : public Session {
 public:
  HttpSession(Host& host, std::string peer)
      : host_(host), peer_(std::move(peer)), timer_(broker_.timers, [this] { port.dropped = true, port.attend(); }) {
    port.session = this;
    timer_.set(broker_.now.steady + kPatience);
  }
  size_t feed(std::string_view input) override {
    const size_t given = input.size();
    while (!parked && !port.closing && (in_body_ ? take_body(input) : take_head(input))) continue;
    const bool begun = in_body_ || !input.empty();  // between two requests, a client may be silent as long as it likes
    if (parked) timer_.set(kNever);
    else if (begun && timer_.due() == kNever) timer_.set(broker_.now.steady + kPatience);
    port.attend();
    return given - input.size();
  }
  void ended(std::string_view) override { port.closing = true; }
  void drained() override { if (parked && !in_body_ && port.out.size() < kMostUnread) unpark(); }

 private:
  static constexpr size_t kLargestHead = size_t{1} << 17;  // so small that it can be searched again when more has come
  static constexpr size_t kMostUnread = size_t{1} << 20;   // of answers: more of them, and the next request has to wait
  static constexpr int64_t kPatience = 60 * kSecond;       // for a request: two default heartbeats of clients over TCP
  static constexpr std::string_view kText = "text/plain; charset=utf-8", kJson = "application/json; charset=utf-8";
  struct Response {
    std::string status = "200 OK", body = {}, headers = "X-Nsq-Content-Type: nsq; version=1.0\r\n";
  };
  enum Needs { kNothing, kTopic, kValidTopic, kNewTopic, kChannel, kNewChannel };
  struct Route {
    std::string_view path, methods;  // as Allow has them
    Needs needs;                     // what find_names finds before `run` is called
    void (*run)(HttpSession&);
  };

  // ---- From bytes to requests, and from responses to bytes ----------------------------------------------------------

  /// This and take_body take what they need off the front of `input`, and return whether it was there.
  bool take_head(std::string_view& input) {
    input.remove_prefix(std::min(input.size(), input.find_first_not_of("\r\n")));  // RFC 9112, 2.2
    const size_t crlf = input.find("\n\r\n"), end = std::min(crlf, input.substr(0, crlf).find("\n\n"));
    if (end == input.npos && input.size() <= kLargestHead) return false;
    request_ = HttpRequest();
    response_ = Response();
    if (std::min(end, input.size()) > kLargestHead) return refuse(431, "HEADERS_TOO_BIG");
    if (const int wrong = request_.parse(take_front(input, end + 1))) return refuse(wrong, "INVALID_REQUEST");
    cut(input, '\n');
    if (request_.path == "/pub" && !is_message(request_.length)) return refuse(413, "MSG_TOO_BIG");
    if (request_.length > largest()) return refuse(413, "BODY_TOO_BIG");
    const bool waits = !request_.old && request_.headers.has("expect", "100-continue");
    if (waits) port.out.append("HTTP/1.1 100 Continue\r\n\r\n");
    return in_body_ = true;
  }
  /// When the answer was parked, this is called again, and takes nothing.
  bool take_body(std::string_view& input) {
    if (request_.chunked) {
      const Chunks taken = take_chunks(input, request_.body, largest() + 1);
      if (taken == Chunks::kBad) return refuse(400, "INVALID_REQUEST");
      if (taken == Chunks::kMore) return false;
      request_.chunked = false;
    }
    if (input.size() < request_.length) return false;
    request_.body += take_front(input, std::exchange(request_.length, 0));
    route();
    if (parked) return false;
    const HttpRequest& r = request_;
    if (r.path != "/pub" && r.path != "/mpub")
      host_.logger.say(Level::kInfo, response_.status.substr(0, 3), " ", r.method, " ", r.target, " (", peer_, ")");
    in_body_ = false;
    timer_.set(kNever);
    return send();
  }

  /// This returns true and fail false, so that endpoints and their steps can end with either.
  bool respond(std::string body, std::string_view type = kText) {
    if (!body.empty()) response_.headers.append("Content-Type: ").append(type).append("\r\n");
    response_.body = std::move(body);
    return true;
  }
  /// nsqd's word for what is wrong is the reason phrase, too, which is for people only (RFC 9112, 4).
  bool fail(int status, std::string_view word) {
    response_.status = text(status, " ", word);
    return !respond(text("{\"message\":\"", word, "\"}"), kJson);
  }
  /// Ends the connection, as nobody knows where its next request begins.
  bool refuse(int status, std::string_view word) {
    request_.keep_alive = fail(status, word);
    return send();
  }
  bool send() {
    const time_t now = static_cast<time_t>(broker_.now.wall / kSecond);
    tm utc{};
    if (std::exchange(dated_, now) != now) date_ = time_text("%a, %d %b %Y %H:%M:%S GMT", *::gmtime_r(&now, &utc));
    port.out.append(text("HTTP/1.1 ", response_.status, "\r\nDate: ", date_, "\r\n", response_.headers,
                         "Connection: ", request_.keep_alive ? "keep-alive" : "close",
                         "\r\nContent-Length: ", response_.body.size(), "\r\n\r\n"));
    if (request_.method != "HEAD") port.out.append(response_.body);
    port.closing = !request_.keep_alive;
    parked = port.out.size() >= kMostUnread;
    return true;
  }

  // ---- From requests to endpoints -----------------------------------------------------------------------------------

  static const Route* find_route(std::string_view path) {
    using S = HttpSession;
    static constexpr std::string_view kGet = "GET, OPTIONS", kPost = "OPTIONS, POST", kGetAndPut = "GET, OPTIONS, PUT";
    static constexpr Route kRoutes[] = {
        {"/pub", kPost, kNothing, [](S& s) { s.pub(); }},
        {"/mpub", kPost, kNewTopic, [](S& s) { s.mpub(); }},
        {"/ping", kGet, kNothing, [](S& s) { s.ping(); }},
        {"/info", kGet, kNothing, [](S& s) { s.info(); }},
        {"/stats", kGet, kNothing, [](S& s) { s.show_stats(); }},
        {"/metrics", kGet, kNothing, [](S& s) { s.show_metrics(); }},
        {"/config/:key", kGetAndPut, kNothing, [](S& s) { s.config(); }},
        {"*", "OPTIONS", kNothing, nullptr},
        {"/topic/create", kPost, kNewTopic, [](S&) {}},
        {"/topic/delete", kPost, kTopic, [](S& s) { s.broker_.delete_topic(*s.topic_); }},
        {"/topic/empty", kPost, kValidTopic, [](S& s) { s.topic_->empty(); }},
        {"/topic/pause", kPost, kTopic, [](S& s) { s.topic_->pause(true); }},
        {"/topic/unpause", kPost, kTopic, [](S& s) { s.topic_->pause(false); }},
        {"/channel/create", kPost, kNewChannel, [](S&) {}},
        {"/channel/delete", kPost, kChannel, [](S& s) { s.topic_->delete_channel(*s.channel_); }},
        {"/channel/empty", kPost, kChannel, [](S& s) { s.channel_->empty(); }},
        {"/channel/pause", kPost, kChannel, [](S& s) { s.channel_->pause(true); }},
        {"/channel/unpause", kPost, kChannel, [](S& s) { s.channel_->pause(false); }},
    };
    if (path.substr(0, 8) == "/config/" && valid_name(path.substr(8))) path = "/config/:key";
    for (const Route& route : kRoutes)
      if (route.path == path) return &route;
    return nullptr;
  }

  /// Carries out a request: its response is 200 with nothing, unless somebody on the way sets another.
  bool route() {
    const Route* route = find_route(request_.path);
    if (route == nullptr) return redirect();
    bool allowed = false;
    for (std::string_view rest = route->methods; !rest.empty();) allowed |= trimmed(cut(rest, ',')) == request_.method;
    if (!allowed || request_.method == "OPTIONS") {
      response_.headers = text(allowed ? "" : response_.headers, "Allow: ", route->methods, "\r\n");
      return allowed || fail(405, "METHOD_NOT_ALLOWED");
    }
    if (request_.method != "GET" && forged()) return fail(403, "CROSS_SITE_REQUEST");
    if (find_names(route->needs)) route->run(*this);
    return true;
  }
  /// A path that is wrong only by slashes or letter case leads to the right one; / is the page, for browsers only.
  bool redirect() {
    if (request_.path == "/" && request_.headers.has("accept", "text/html")) {
      response_.headers = text("Cache-Control: no-cache\r\nX-Content-Type-Options: nosniff\r\n",
                               "Content-Security-Policy: ", kPagePolicy, "\r\n");
      return respond(std::string(kPage), "text/html; charset=utf-8");
    }
    const std::string query = request_.target.substr(std::min(request_.target.find('?'), request_.target.size()));
    std::string path;
    for (std::string_view rest = request_.path; !rest.empty();)
      if (const std::string_view part = cut(rest, '/'); !part.empty()) path += "/" + lower(part);
    if (find_route(path) == nullptr) return fail(404, "NOT_FOUND");
    response_.status = request_.method == "GET" ? "301 Moved Permanently" : "307 Temporary Redirect";
    response_.headers = text("Location: ", path, query, "\r\n");
    return true;
  }
  /// Whether a browser may send this for a page of another site, even one whose name was made to lead here. Programs
  /// that are no browsers send neither Origin nor Sec-Fetch-Site.
  bool forged() const {
    const auto header = [this](std::string_view name) { return lower(request_.headers.get(name).value_or("")); };
    const std::string origin = header("origin"), site = header("sec-fetch-site"), host = header("host");
    const std::string name = host.substr(0, host.rfind(':'));
    if (origin.empty() && site.empty()) return false;
    if (!origin.empty() && origin != "http://" + host) return true;
    if (!site.empty() && site != "same-origin" && site != "none") return true;
    const bool address = host[0] == '[' || (!name.empty() && name.find_first_not_of(".0123456789") == name.npos);
    const bool known = name == lower(host_name()) || name == lower(options_.broadcast_address);
    return !address && !known && !ends_with("." + name, ".localhost");
  }
  /// Sets topic_ and channel_. False when the response tells what is wrong with their names, or when the request is
  /// parked because nsqlookupd has to be asked for the channels of a new topic first.
  bool find_names(Needs needs) {
    if (needs == kNothing) return true;
    if (!request_.query_valid) return fail(400, "INVALID_REQUEST");
    const auto topic = request_.parameters.get("topic"), channel = request_.parameters.get("channel");
    const bool of_channel = needs >= kChannel;
    if (!topic) return fail(400, "MISSING_ARG_TOPIC");
    if (needs != kTopic && !valid_name(*topic)) return fail(400, of_channel ? "INVALID_ARG_TOPIC" : "INVALID_TOPIC");
    if (of_channel && !channel) return fail(400, "MISSING_ARG_CHANNEL");
    if (of_channel && !valid_name(*channel)) return fail(400, "INVALID_ARG_CHANNEL");
    topic_ = broker_.find(*topic);
    if (topic_ == nullptr && needs == kNewTopic && host_.look_up(*topic, *this)) return false;
    if (needs == kNewTopic) topic_ = &broker_.topic(*topic);
    if (topic_ == nullptr) return fail(404, "TOPIC_NOT_FOUND");
    Status made;
    channel_ = !of_channel ? nullptr : needs == kChannel ? topic_->find(*channel) : topic_->channel(*channel, made);
    if (!of_channel || channel_ != nullptr) return true;
    return made.ok() ? fail(404, "CHANNEL_NOT_FOUND") : fail(500, "INTERNAL_ERROR");
  }

  // ---- The endpoints ------------------------------------------------------------------------------------------------

  bool ping() {
    const std::string health = broker_.storage.health();
    if (health != "OK") response_.status = "500 NOK";
    response_.headers.clear();
    return respond(health);
  }
  bool info() {
    JsonWriter json;
    json.open('{').member("version", kProtocolVersion).member("broadcast_address", options_.broadcast_address);
    json.member("hostname", host_name()).member("http_port", host_.http_port).member("tcp_port", host_.tcp_port);
    json.member("start_time", host_.started_wall / kSecond);
    json.member("max_heartbeat_interval", int64_t{options_.max_heartbeat_interval.count()});
    json.member("max_output_buffer_size", options_.max_output_buffer_size);
    json.member("max_output_buffer_timeout", int64_t{options_.max_output_buffer_timeout.count()});
    json.member("max_deflate_level", options_.max_deflate_level).member("topology_zone", options_.topology_zone);
    return respond(json.member("topology_region", options_.topology_region).close('}').out, kJson);
  }
  bool show_stats() {
    if (!request_.query_valid) return fail(400, "INVALID_REQUEST");
    const HttpFields& given = request_.parameters;
    const StatsQuery query{std::string(given.get("topic").value_or("")), std::string(given.get("channel").value_or("")),
                           given.wanted("include_clients"), given.wanted("include_mem")};
    const Stats stats = take_stats(host_, query);
    const bool topic_known = query.topic.empty() || broker_.find(query.topic) != nullptr;
    if (given.get("format") == "json") return respond(stats_json(stats, query, topic_known), kJson);
    return respond(stats_text(stats, query, broker_.now, host_.started_wall));
  }
  bool show_metrics() {
    const Stats stats = take_stats(host_, {{}, {}, false, false});
    return respond(metrics_text(stats, host_.connections()), "text/plain; version=0.0.4; charset=utf-8");
  }

  size_t largest() const { return static_cast<size_t>(std::max(options_.max_msg_size, options_.max_body_size)); }
  bool is_message(size_t size) const { return size <= static_cast<size_t>(options_.max_msg_size); }

  bool publish(const std::string_view* bodies, size_t count, int64_t delay) {
    return topic_->publish(bodies, count, delay).ok() ? respond("OK") : fail(503, "EXITING");
  }
  bool pub() {
    if (!is_message(request_.body.size())) return fail(413, "MSG_TOO_BIG");
    if (request_.body.empty()) return fail(400, "MSG_EMPTY");
    if (!find_names(kNewTopic)) return false;
    const auto ms = decimal(request_.parameters.get("defer").value_or("0"), true);
    if (!ms || *ms < 0 || *ms > options_.max_req_timeout.count() / kMillisecond) return fail(400, "INVALID_DEFER");
    const std::string_view body = request_.body;
    return publish(&body, 1, *ms * kMillisecond);
  }
  bool mpub() {
    std::vector<std::string_view> bodies;
    const bool binary = request_.parameters.get("binary") && request_.parameters.wanted("binary");
    if (!binary && request_.body.size() > static_cast<size_t>(options_.max_body_size)) return fail(413, "BODY_TOO_BIG");
    for (std::string_view rest = request_.body; !binary && !rest.empty();) {
      const std::string_view line = cut(rest, '\n');
      if (!is_message(line.size())) return fail(413, "MSG_TOO_BIG");
      if (!line.empty()) bodies.push_back(line);
    }
    return (!binary || split(bodies)) && publish(bodies.data(), bodies.size(), 0);
  }
  /// count { size body }*
  bool split(std::vector<std::string_view>& bodies) {
    std::string_view rest = request_.body;
    const auto number = [&rest] {  // 0 where the body ends too early; as a number, it would be wrong as well
      const std::string_view bytes = take_front(rest, 4);
      return bytes.size() < 4 ? 0 : get_be<uint32_t>(bytes.data());
    };
    const uint32_t count = number();
    if (count == 0 || count > (options_.max_body_size - 4) / 5) return fail(413, "BAD_BODY");
    while (bodies.size() < count) {
      const uint32_t size = number();
      bodies.push_back(take_front(rest, size));
      if (size == 0 || !is_message(size) || bodies.back().size() < size) return fail(413, "BAD_MESSAGE");
    }
    return true;
  }

  bool config() {
    const std::string key = request_.path.substr(8), &value = request_.body;
    const bool put = request_.method == "PUT";
    if (put && (value.empty() || !is_message(value.size()))) return fail(413, "INVALID_VALUE");
    if (put && key == "log_level") {
      const auto level = parse_level(value);
      if (!level) return fail(400, "INVALID_VALUE");
      host_.logger.set_level(host_.options.log_level = *level);
    } else if (put && key == "nsqlookupd_tcp_addresses") {
      JsonParser parser{value};
      const Json list = parser.parse();
      std::vector<std::string> addresses;
      for (const Json& item : list.items)
        if (item.is(Json::Type::kString)) addresses.push_back(item.string);
      if (!list.is(Json::Type::kArray) || addresses.size() < list.items.size()) return fail(400, "INVALID_VALUE");
      host_.set_lookupds(addresses);
    } else if (put) return fail(400, "INVALID_OPTION");
    const auto shown = show_option(options_, key);
    return shown ? respond(shown->value, shown->json ? kJson : kText) : fail(400, "INVALID_OPTION");
  }

  Host& host_;
  Broker& broker_ = host_.broker;
  const Options& options_ = host_.options;
  const std::string peer_;
  HttpRequest request_;
  Response response_;  // 200 with nothing, until somebody sets another
  time_t dated_ = 0;
  std::string date_;  // dated_ as headers show it
  Topic* topic_ = nullptr;
  Channel* channel_ = nullptr;
  bool in_body_ = false;  // the head has arrived; with it, the body may have, too
  Timer timer_;
};

// ---------------------------------------------------------------------------------------------------------------------
// [13] Peers
//
// Servers that the daemon speaks to: nsqlookupd (over TCP, and its HTTP side) and the auth server. Each is a session as
// those of the clients are, only that we begin it.
// Always: nobody waits for a peer but the command that needs its answer, and that no longer than the peer's time limit.
// ---------------------------------------------------------------------------------------------------------------------

/// Opens a connection for a session; its connected() or ended() is called later. Part of the loop.
using Dial = std::function<void(const std::string& address, std::shared_ptr<Session> session)>;

/// One question to an HTTP server that answers in JSON: a GET or, with a body, a POST. `done` is called once, with the
/// answer, or with null and why there is none.
class HttpCall : public Session {
 public:
  using Done = std::function<void(const Json& answer, const std::string& failure)>;

  HttpCall(Broker& broker, std::string_view host, std::string_view target, std::string_view body, Done done)
      : broker_(broker), done_(std::move(done)), timer_(broker.timers, [this] { finish({}, "timed out"); }) {
    port.session = this;
    const std::string type = text("Content-Type: application/json\r\nContent-Length: ", body.size(), "\r\n");
    port.out.append(text(body.empty() ? "GET " : "POST ", target, " HTTP/1.1\r\nHost: ", host,
                         "\r\nUser-Agent: nsqd.hpp/", kVersion, "\r\nAccept: application/vnd.nsq; version=1.0\r\n",
                         "Connection: close\r\n", body.empty() ? "" : type, "\r\n", body));
    wait(broker.options.http_client_connect_timeout);
  }
  void connected() override { wait(broker_.options.http_client_request_timeout); }
  size_t feed(std::string_view input) override {
    take(input, false);
    return input.size();
  }
  void ended(std::string_view rest) override { take(rest, true); }

 private:
  static constexpr size_t kLargestAnswer = size_t{4} << 20;

  void wait(Duration time) { timer_.set(saturating_add(broker_.now.steady, time.count())); }
  /// The body is complete by its chunks, by its length or, where it has neither, by the end of the connection.
  void take(std::string_view input, bool final) {
    received_ += input;
    const std::string_view all = received_;
    const size_t line = all.find("\r\n"), end = all.find("\r\n\r\n");
    if (all.size() > kLargestAnswer) return finish({}, "answer too large");
    HttpFields headers;
    std::string body;
    bool whole = end != all.npos;
    if (whole) {
      if (!headers.parse(all.substr(line + 2, end - line))) return finish({}, "not HTTP");
      std::string_view rest = all.substr(end + 4);
      const bool chunked = headers.has("transfer-encoding", "chunked");
      const auto length = headers.get("content-length");
      const auto size = static_cast<size_t>(decimal(length.value_or("")).value_or(kNever));
      if (!chunked) body = rest.substr(0, size);
      if (chunked) whole = take_chunks(rest, body, kLargestAnswer) == Chunks::kDone;
      else whole = length ? rest.size() >= size : final;
    }
    if (!whole) return final ? finish({}, "connection closed") : void();
    if (!ends_with(all.substr(0, 12), " 200")) return finish({}, text(all.substr(0, std::min<size_t>(line, 100))));
    JsonParser parser{body};
    const Json answer = parser.parse();
    finish(answer, parser.error);
  }
  void finish(const Json& answer, const std::string& failure) {
    port.dropped = true;
    port.attend();
    if (const Done done = std::exchange(done_, nullptr)) done(answer, failure);
  }

  Broker& broker_;
  Done done_;
  std::string received_;
  Timer timer_;
};

/// All nsqlookupds and what they are told, the topics that wait for them, and the questions to the auth servers.
class Cluster {
 public:
  Cluster(Broker& broker, Dial dial) : broker_(broker), dial_(std::move(dial)) {}

  void set_peers(const std::vector<std::string>& addresses) {
    auto before = std::exchange(peers_, {});
    for (const std::string& address : addresses)
      if (auto kept = before.extract(address)) peers_.insert(std::move(kept));
      else if (peers_.count(address) == 0) peers_[address] = std::make_shared<LookupPeer>(*this, address, 0);
    for (const auto& [address, peer] : before) peer->give_up();
  }
  void tell(const Topic& topic, const Channel* channel, bool created) {
    const std::string name = channel == nullptr ? topic.name : text(topic.name, " ", channel->name);
    for (const auto& [address, peer] : peers_) peer->tell(text(created ? "REGISTER " : "UNREGISTER ", name, "\n"));
  }

  /// Makes a topic and asks for its channels; nothing is handed over before all peers have answered or failed. The
  /// session is parked for that long; other publishers may store meanwhile. False when there is nobody to ask.
  bool look_up(std::string_view name, Session& session) {
    if (peers_.empty()) return false;
    Topic& made = broker_.topic(name);
    std::vector<std::string> urls;
    for (const auto& [address, peer] : peers_)
      if (!peer->http_address.empty())
        urls.push_back(text("http://", peer->http_address, "/channels?topic=", percent_encoded(name)));
    if (urls.empty()) {
      broker_.logger.say(Level::kError, "no available nsqlookupd to query for channels to pre-create for topic ", name);
      return false;
    }
    struct Asked {
      size_t missing;  // answers
      std::set<std::string> channels;
    };
    const auto asked = std::make_shared<Asked>(Asked{urls.size(), {}});
    const auto asker = session.weak_from_this();
    made.hold_back(true);
    session.parked = true;
    for (const std::string& url : urls)
      ask(url, "", [this, url, asked, asker, topic = made.name](const Json& answer, const std::string& why) {
        if (answer.find("channels") == nullptr)
          broker_.logger.say(Level::kWarning, "failed to query ", url, " - no usable answer ", why);
        for (const Json& channel : answer.get("channels").items)
          if (valid_name(channel.string) && !is_ephemeral(channel.string)) asked->channels.insert(channel.string);
        if (--asked->missing > 0) return;
        if (Topic* waiting = broker_.find(topic)) {
          Status created;
          for (const std::string& channel : asked->channels) static_cast<void>(waiting->channel(channel, created));
          waiting->hold_back(false);
        }
        if (const auto parked = asker.lock()) parked->unpark();
      });
    return true;
  }

  /// Asks the auth servers, beginning with that one, until one has a usable answer. It parks the session.
  void ask_auth(V2Session& session, size_t which, size_t left) {
    const auto& servers = broker_.options.auth_http_address;
    const std::string& server = servers[which % servers.size()];
    std::string url = server.find("://") == server.npos ? text("http://", server, "/auth") : server, body;
    const auto json = [](const std::string& value) { return JsonWriter().value(value).out; };
    if (broker_.options.auth_http_request_method == "post")
      body = text(R"({"common_name":[""],"remote_ip":[)", json(session.ip()), R"(],"secret":[)", json(session.secret()),
                  R"(],"tls":["false"]})");
    else
      url += text(url.find('?') == url.npos ? "?" : "&", "common_name=&remote_ip=", percent_encoded(session.ip()),
                  "&secret=", percent_encoded(session.secret()), "&tls=false");
    session.parked = true;
    const auto asker = session.weak_from_this();
    ask(url, body, [this, server, which, left, asker](const Json& answer, const std::string& why) {
      auto grant = parse_grant(answer);
      if (grant == nullptr) broker_.logger.say(Level::kError, "AUTH: ", server, " - no usable answer ", why);
      const auto locked = asker.lock();
      if (locked == nullptr) return;
      auto& waiting = static_cast<V2Session&>(*locked);
      if (grant == nullptr && left > 1) ask_auth(waiting, which + 1, left - 1);
      else waiting.auth_answered(std::move(grant));
    });
  }

 private:
  /// The connection to one nsqlookupd: a greeting with all that there is, then each change, and PING in between.
  /// Always: to_say_ begins with the command that waits for its answer. When that is late, or anything else fails,
  /// another LookupPeer takes the place of this one, to call after a longer pause and to greet anew.
  class LookupPeer : public Session {
   public:
    LookupPeer(Cluster& cluster, std::string address, int64_t pause)
        : cluster_(cluster), broker_(cluster.broker_), address_(std::move(address)), pause_(pause),
          timer_(broker_.timers, [this] { on_timer(); }) {
      port.session = this;
      wait(pause);
    }
    std::string http_address;  // host:port of its HTTP side; empty while that is not known

    size_t feed(std::string_view input) override {
      std::string_view rest = input;
      while (!over_ && rest.size() >= 4) {
        const size_t size = get_be<uint32_t>(rest.data());
        if (static_cast<int64_t>(size) > broker_.options.max_body_size) fail("answer too large");
        if (over_ || rest.size() - 4 < size) break;
        take(rest.substr(4, size));
        rest.remove_prefix(4 + size);
      }
      return input.size() - rest.size();
    }
    void ended(std::string_view) override { fail("connection closed"); }

    /// What happens before it calls is in the greeting.
    void tell(std::string command) {
      if (!called_) return;
      to_say_.push_back(std::move(command));
      if (to_say_.size() == 1) say_next();
    }
    void give_up() {
      over_ = port.dropped = true;
      timer_.set(kNever);
      port.attend();
    }

   private:
    static constexpr int64_t kPatience = kSecond, kPing = 15 * kSecond;  // nsqd 1.3.0
    static constexpr int64_t kShortestPause = kSecond / 4, kLongestPause = 15 * kSecond;

    void wait(int64_t time) { timer_.set(broker_.now.steady + time); }
    void on_timer() {
      if (std::exchange(called_, true)) return to_say_.empty() ? tell("PING\n") : fail("no answer in time");
      const Options& options = broker_.options;
      JsonWriter json;  // keys sorted, as nsqd's are
      json.open('{').member("broadcast_address", options.broadcast_address).member("hostname", host_name());
      json.member("http_port", options.broadcast_http_port).member("tcp_port", options.broadcast_tcp_port);
      json.member("topology_region", options.topology_region).member("topology_zone", options.topology_zone);
      json.member("version", kProtocolVersion).close('}');
      std::string size(4, '\0');
      put_be(size.data(), static_cast<uint32_t>(json.out.size()));
      port.out.append("  V1");
      tell(text("IDENTIFY\n", size, json.out));
      for (const auto& [name, topic] : broker_.topics) {
        if (topic->channels.empty()) tell(text("REGISTER ", name, "\n"));
        for (const auto& channel : topic->channels) tell(text("REGISTER ", name, " ", channel.first, "\n"));
      }
      cluster_.dial_(address_, shared_from_this());
    }
    void say_next() {
      port.out.append(to_say_.front());
      port.attend();
      wait(kPatience);
    }
    /// Looks at the answer to IDENTIFY; those to the other commands are of no interest.
    void take(std::string_view answer) {
      if (to_say_.empty()) return fail("answer without a question");
      if (!greeted_ && !identify(answer)) return fail(text("IDENTIFY was answered by ", answer.substr(0, 100)));
      to_say_.pop_front();
      if (to_say_.empty()) wait(kPing);
      else say_next();
    }
    bool identify(std::string_view answer) {
      JsonParser parser{answer};
      const Json json = parser.parse();
      const std::string& host = json.get("broadcast_address").string;
      const int64_t http_port = json.get("http_port").integer().value_or(0);
      const bool usable = !host.empty() && http_port > 0 && host.find_first_of("/ \r\n") == host.npos;
      if (usable) http_address = text(host.find(':') == host.npos ? host : "[" + host + "]", ":", http_port);
      greeted_ = json.is(Json::Type::kObject);
      if (greeted_) broker_.logger.say(Level::kInfo, "LOOKUPD(", address_, "): connected");
      return greeted_;
    }
    void fail(std::string_view why) {
      if (over_) return;
      broker_.logger.say(Level::kError, "LOOKUPD(", address_, "): ", why);
      give_up();
      const int64_t pause = greeted_ ? kShortestPause : std::clamp(2 * pause_, kShortestPause, kLongestPause);
      cluster_.peers_[address_] = std::make_shared<LookupPeer>(cluster_, address_, pause);
    }

    Cluster& cluster_;
    Broker& broker_;
    const std::string address_;
    const int64_t pause_;
    bool called_ = false, greeted_ = false, over_ = false;
    std::deque<std::string> to_say_;
    Timer timer_;
  };

  /// Asks a question at http://host[:port][/path].
  void ask(const std::string& url, const std::string& body, HttpCall::Done done) {
    const size_t begin = url.find("://") + 3, end = std::min(url.find_first_of("/?", begin), url.size());
    const std::string host = url.substr(begin, end - begin), path = url.substr(end);
    const bool has_port = host.find(':', host.find(']') + 1) != host.npos;  // from the front where there is no ]
    const bool https = url.compare(0, 8, "https://") == 0;  // there is no TLS: no address, so that it fails at once
    auto call = std::make_shared<HttpCall>(broker_, host, path[0] == '/' ? path : "/" + path, body, std::move(done));
    dial_(https ? "" : has_port ? host : host + ":80", std::move(call));
  }

  /// An answer without a ttl, with an unknown permission or a broken pattern is as good as none.
  std::shared_ptr<AuthGrant> parse_grant(const Json& json) const {
    const int64_t ttl = std::clamp<int64_t>(json.get("ttl").integer().value_or(0), 0, kNever / kSecond);
    bool good = ttl > 0;
    auto grant = std::make_shared<AuthGrant>();
    grant->expires = saturating_add(broker_.now.steady, ttl * kSecond);
    grant->identity = json.get("identity").string;
    grant->identity_url = json.get("identity_url").string;
    for (const Json& item : json.get("authorizations").items) {
      AuthGrant::Authorization added{Pattern(item.get("topic").string)};
      for (const Json& channel : item.get("channels").items) added.channels.emplace_back(channel.string);
      for (const Json& permission : item.get("permissions").items) {
        const bool publish = permission.string == "publish";
        (publish ? added.publish : added.subscribe) = true;
        good = good && (publish || permission.string == "subscribe");
      }
      const auto valid = [](const Pattern& pattern) { return pattern.valid(); };
      good = good && valid(added.topic) && std::all_of(added.channels.begin(), added.channels.end(), valid);
      grant->authorizations.push_back(std::move(added));
    }
    return good ? grant : nullptr;
  }

  Broker& broker_;
  const Dial dial_;
  std::map<std::string, std::shared_ptr<LookupPeer>> peers_;
};

// ---------------------------------------------------------------------------------------------------------------------
// [14] The poll loop
//
// The only part with sockets and clocks. It owns the connections, feeds what arrives to their sessions and writes what
// these have appended. Nothing here blocks but poll(2) itself; what would block is done by the Worker.
// Always: pollfd i belongs to connection i; a session that was dropped is fed no more and goes at the end of the turn.
// ---------------------------------------------------------------------------------------------------------------------

/// host:port taken apart; nothing where it is no such thing, and so the path of a Unix socket.
inline std::optional<std::pair<std::string, std::string>> split_address(const std::string& address) {
  const size_t colon = address.rfind(':');
  if (colon == address.npos || address.find('/') != address.npos) return std::nullopt;
  std::string host = address.substr(0, colon);
  if (host.size() >= 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  else if (host.find(':') != host.npos) return std::nullopt;
  return std::make_pair(host, address.substr(colon + 1));
}

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t size = sizeof(sockaddr_storage);

  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
  int family() const { return storage.ss_family; }
  /// As nsqd shows it: ip:port, [ip]:port, or @ on a Unix socket.
  std::string text() const {
    std::array<char, 128> ip{}, port{};
    if (family() != AF_INET && family() != AF_INET6) return "@";
    ::getnameinfo(get(), size, ip.data(), ip.size(), port.data(), port.size(), NI_NUMERICHOST | NI_NUMERICSERV);
    std::string host = ip.data();
    if (host.compare(0, 7, "::ffff:") == 0) host.erase(0, 7);  // IPv4 on a socket for IPv6
    return detail::text(host.find(':') == host.npos ? host : "[" + host + "]", ":", port.data());
  }
};

/// The addresses that host:port stands for. This may ask a name server, so never on the loop's thread.
inline Status resolve(const std::string& address, int type, int flags, std::vector<SocketAddress>& found) {
  const auto split = split_address(address);
  if (!split || decimal(split->second).value_or(kNever) > 65535) return {text("invalid port in \"", address, "\"")};
  addrinfo hints{}, *list = nullptr;
  hints.ai_socktype = type;
  hints.ai_flags = flags;
  const auto& [host, port] = *split;
  const int code = ::getaddrinfo(host.empty() ? nullptr : host.c_str(), port.c_str(), &hints, &list);
  if (code != 0) return {text("lookup ", host, ": ", ::gai_strerror(code))};
  for (const addrinfo* item = list; item != nullptr; item = item->ai_next) {
    SocketAddress& next = found.emplace_back();
    std::memcpy(&next.storage, item->ai_addr, next.size = item->ai_addrlen);
  }
  ::freeaddrinfo(list);
  return {};
}

inline Fd open_socket(int family, int type = SOCK_STREAM) {
  return Fd(::socket(family, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
}

/// A socket that listens, on host:port or on a path. Its destructor removes the file of a Unix socket.
struct Listener {
  using Greet = std::function<std::shared_ptr<Session>(const std::string& peer)>;

  Listener(std::string_view name, const std::string& at, Greet greeting) : kind(name), greet(std::move(greeting)) {
    std::vector<SocketAddress> places;
    const auto split = split_address(at);
    Status status = split ? resolve(at, SOCK_STREAM, AI_PASSIVE, places) : place_of_path(at, places);
    const int family = split && split->first.empty() ? AF_INET6 : AF_INET;  // IPv6 first for all: it takes IPv4, too
    std::stable_partition(places.begin(), places.end(), [=](const auto& place) { return place.family() == family; });
    for (const SocketAddress& place : places)
      if (!fd) status = open(place);
    if (!fd) throw std::runtime_error(text("listen (", at, ") failed - ", status.error));
    SocketAddress address;
    ::getsockname(fd.get(), address.get(), &address.size);
    path = split ? "" : at;
    shown = split ? address.text() : at;
    if (split) port = static_cast<int>(decimal(shown.substr(shown.rfind(':') + 1)).value_or(-1));
  }
  ~Listener() { static_cast<void>(path.empty() || ::unlink(path.c_str()) == 0); }

  const std::string kind;  // TCP or HTTP
  const Greet greet;
  Fd fd;
  std::string path, shown;  // the path of a Unix socket; and the address for people
  int port = -1;

 private:
  Status open(const SocketAddress& place) {
    static constexpr int kBacklog = 4096, kYes = 1, kNo = 0;  // a full backlog costs a client a second
    static constexpr std::string_view kAdvice = "; stop who listens there, or choose another address (port 0: any)";
    Fd made = open_socket(place.family());
    ::setsockopt(made.get(), SOL_SOCKET, SO_REUSEADDR, &kYes, sizeof kYes);
    if (place.family() == AF_INET6) ::setsockopt(made.get(), IPPROTO_IPV6, IPV6_V6ONLY, &kNo, sizeof kNo);
    if (!made || ::bind(made.get(), place.get(), place.size) != 0 || ::listen(made.get(), kBacklog) != 0)
      return {text("bind: ", lower(std::strerror(errno)), errno == EADDRINUSE ? kAdvice : "")};
    fd = std::move(made);
    return {};
  }
  static Status place_of_path(const std::string& at, std::vector<SocketAddress>& places) {
    sockaddr_un name{};
    if (at.size() >= sizeof name.sun_path) return {"the path of a unix socket must be shorter"};
    name.sun_family = AF_UNIX;
    at.copy(name.sun_path, at.size());
    SocketAddress& place = places.emplace_back();
    std::memcpy(&place.storage, &name, place.size = sizeof name);
    struct stat about {};
    const bool there = ::lstat(at.c_str(), &about) == 0 && S_ISSOCK(about.st_mode);
    const Fd probe = open_socket(AF_UNIX);  // nobody listens there any more: left by a process that was killed
    if (there && ::connect(probe.get(), place.get(), place.size) != 0 && errno == ECONNREFUSED) ::unlink(at.c_str());
    return {};
  }
};

/// Signals are for the program's own threads, but for those that say that a thread of ours is broken.
inline void block_signals() {
  sigset_t blocked;
  ::sigfillset(&blocked);
  for (int broken : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) ::sigdelset(&blocked, broken);
  ::pthread_sigmask(SIG_BLOCK, &blocked, nullptr);
}

/// A thread for what would block the loop: fsync, and asking for the addresses of names. Jobs run one after the other.
class Worker {
 public:
  ~Worker() {
    post(nullptr);  // the last one
    thread_.join();
  }
  void post(std::function<void()> job) {
    const std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back(std::move(job));
    wake_.notify_one();
  }

 private:
  void run() {
    block_signals();
    for (std::function<void()> job = [] {}; job != nullptr;) {
      job();
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return !jobs_.empty(); });
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
  }
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> jobs_;
  std::thread thread_{[this] { run(); }};
};

/// In the place of a session that has said everything. A socket closed with input unread would be reset, and the client
/// might never see its error: so only our side is closed, and what still comes is thrown away for a moment.
struct Silence : Session {
  Silence(Timers& timers, int64_t until) : timer(timers, [this] { ended({}); }) { timer.set(until); }
  size_t feed(std::string_view input) override { return input.size(); }
  void ended(std::string_view) override {
    port.dropped = true;
    port.attend();
  }
  Timer timer;
};

class Loop {
 public:
  explicit Loop(Broker& broker) : broker_(broker), pause_(broker.timers, [] {}), arrived_(kReadSize, '\0') {
    std::array<int, 2> ends{};
    if (::pipe2(ends.data(), O_NONBLOCK | O_CLOEXEC) != 0) throw_unless(system_error("make", "a pipe"));
    wake_read_ = Fd(ends[0]);
    wake_write_ = Fd(ends[1]);
    place(nullptr, wake_read_.get());
    rlimit limit{};
    ::getrlimit(RLIMIT_NOFILE, &limit);
    most_connections_ = limit.rlim_cur - std::min<rlim_t>(64, limit.rlim_cur / 2);
    read_clocks();
  }

  /// Runs a task on the loop's thread, in its next turn; throws it away when the loop takes none. From any thread.
  void post(std::function<void()> task) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!takes_tasks_) return;
    if (tasks_.empty()) [[maybe_unused]] const ssize_t written = ::write(wake_write_.get(), "", 1);
    tasks_.push_back(std::move(task));
  }
  void take_tasks(bool from_now_on) {
    const std::lock_guard<std::mutex> lock(mutex_);
    takes_tasks_ = from_now_on;
    tasks_.clear();
  }

  /// Before there are connections. Returns the port.
  int listen(std::string_view kind, const std::string& address, Listener::Greet greet) {
    const Listener& made = *listeners_.emplace_back(std::make_unique<Listener>(kind, address, std::move(greet)));
    place(nullptr, made.fd.get());
    hot_end_ = fds_.size();
    return made.port;
  }
  /// This and the next when there will be no turn any more.
  void close_listeners(std::string_view kind) {
    for (auto& listener : listeners_) {
      if (listener == nullptr || listener->kind != kind) continue;
      broker_.logger.say(Level::kInfo, kind, ": closing ", listener->shown);
      listener.reset();
    }
  }
  void close_connections() {
    while (connections() > 0) destroy(*connections_.back());
    attended_.clear();
  }

  /// Takes a session that has no socket: its drained() is called when it has something to take, and ended() at its end.
  void adopt(std::shared_ptr<Session> session) { add(std::move(session), State::kInside, Fd()); }

  /// Connects to host:port; connected() or ended() of the session is called, later.
  void dial(const std::string& address, std::shared_ptr<Session> session, Worker& worker) {
    const std::weak_ptr<Connection> dialling = add(std::move(session), State::kConnecting, Fd());
    worker.post([this, address, dialling] {
      std::vector<SocketAddress> found;
      static_cast<void>(resolve(address, SOCK_STREAM, 0, found));  // none: it fails
      post([this, dialling, found] {
        const auto connection = dialling.lock();
        if (connection == nullptr || connection->session->port.dropped) return;
        connection->untried.assign(found.rbegin(), found.rend());
        connect_to_next(*connection);
      });
    });
  }

  /// One turn. `store` makes durable what the turn has changed: nothing is written to a client before that.
  void turn(const std::function<void()>& store) {
    serve_ready(wait());
    broker_.timers.run(broker_.now.steady);
    feed_attended();
    broker_.pump();
    store();
    write_attended();
    broker_.after_write();
    for (Connection* closed : std::exchange(closed_, {})) destroy(*closed);
  }

  const std::vector<std::unique_ptr<Listener>>& listeners() const { return listeners_; }
  size_t connections() const { return connections_.size() - first(); }
  void each_session(const std::function<void(const Session&)>& visit) const {
    for (size_t i = first(); i < connections_.size(); ++i) visit(*connections_[i]->session);
  }

 private:
  static constexpr size_t kReadSize = size_t{1} << 17;    // bytes per read
  static constexpr size_t kMostUnread = size_t{4} << 20;  // bytes waiting on either side: above it, no more are read
  static constexpr int64_t kLinger = 2 * kSecond;         // for a client to read its last error
  static constexpr size_t kFewIdle = 64;                  // that it does no harm to look at each time

  enum class State {
    kInside,      // a session of this process, without a socket
    kConnecting,  // dialled; there is no socket before the address is known
    kOpen,
    kEnded,       // the peer sends no more
  };
  struct Connection {
    std::shared_ptr<Session> session;
    State state;
    Fd fd;
    size_t slot = 0;         // its place in fds_ and connections_
    int64_t active = 0;      // when something arrived last
    bool attended = false;   // listed in attended_, or in closed_ for good
    std::string input = {};  // what has arrived and is not done with
    std::vector<SocketAddress> untried = {};  // addresses of the name that is dialled, the next one last
  };

  // ---- waiting
  /// Sleeps until a socket is ready or a timer is due, and returns how many sockets were looked at. poll(2) costs time
  /// for each: so while some connections are busy and many are not, it looks at the busy ones, which are in front, and
  /// at all of them in a tenth of the time only.
  size_t wait() {
    const bool many_idle = fds_.size() - hot_end_ > kFewIdle && hot_end_ > first();
    const bool busy_only = many_idle && broker_.now.steady < next_look_;
    if (const size_t polled = busy_only ? poll(hot_end_, next_look_) : 0) return polled;
    const int64_t begun = broker_.now.steady;
    const size_t polled = poll(fds_.size(), many_idle ? 0 : kNever);
    look_every_ = std::clamp(9 * (broker_.now.steady - begun), kMillisecond, 20 * kMillisecond);
    next_look_ = broker_.now.steady + look_every_;
    for (size_t i = hot_end_; i-- > first();)
      if (broker_.now.steady - connections_[i]->active > 5 * look_every_) swap_slots(i, --hot_end_);
    return polled;
  }
  /// Looks at the first `count`, until the time `until` or the next timer if that is sooner; 0 when none is ready.
  size_t poll(size_t count, int64_t until) {
    const bool work = !attended_.empty() || broker_.has_work();
    const int64_t left = work ? 0 : std::min(until, broker_.timers.next()) - broker_.now.steady;
    const int64_t ms = (std::clamp<int64_t>(left, 0, 3600 * kSecond) + kMillisecond - 1) / kMillisecond;
    for (size_t i = 1; i < first(); ++i) fds_[i].events = pause_.due() == kNever ? POLLIN : 0;
    const bool ready = ::poll(fds_.data(), count, static_cast<int>(ms)) > 0;
    read_clocks();
    return ready ? count : 0;
  }
  void read_clocks() {
    timespec steady{}, wall{};
    ::clock_gettime(CLOCK_MONOTONIC, &steady);
    ::clock_gettime(CLOCK_REALTIME, &wall);
    broker_.now = {steady.tv_sec * kSecond + steady.tv_nsec, wall.tv_sec * kSecond + wall.tv_nsec};
  }
  /// A connection that becomes busy changes places with one that was looked at before, so none is passed over.
  void serve_ready(size_t polled) {
    for (size_t i = 0; i < polled; ++i) {
      const short events = std::exchange(fds_[i].revents, short{0});
      if (events == 0) continue;
      if (i == 0) run_tasks();
      else if (i < first()) accept_from(*listeners_[i - 1]);
      else serve(*connections_[i], events);
    }
  }
  void run_tasks() {
    std::array<char, 64> bytes;
    while (::read(wake_read_.get(), bytes.data(), bytes.size()) > 0) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    const auto tasks = std::exchange(tasks_, {});
    lock.unlock();
    for (const auto& task : tasks) task();
  }

  // ---- connections
  size_t first() const { return 1 + listeners_.size(); }  // connection; before it, the wake-up pipe and the listeners

  void place(std::shared_ptr<Connection> connection, int fd) {
    connections_.push_back(std::move(connection));
    fds_.push_back({fd, POLLIN, 0});  // poll(2) passes over -1
  }
  std::shared_ptr<Connection> add(std::shared_ptr<Session> session, State state, Fd fd) {
    auto made = std::make_shared<Connection>(Connection{nullptr, state, std::move(fd), fds_.size()});
    give(*made, std::move(session));
    place(made, made->fd.get());
    return made;
  }
  void give(Connection& connection, std::shared_ptr<Session> session) {
    session->port.attend = [this, &connection] { attend(connection); };
    connection.session = std::move(session);
  }
  void attend(Connection& connection) {
    if (!std::exchange(connection.attended, true)) attended_.push_back(&connection);
  }
  void swap_slots(size_t a, size_t b) {
    std::swap(fds_[a], fds_[b]);
    std::swap(connections_[a], connections_[b]);
    connections_[a]->slot = a;
    connections_[b]->slot = b;
  }
  void destroy(Connection& connection) {
    connection.session->port.attend = [] {};
    if (connection.state == State::kInside) connection.session->ended({});
    if (connection.slot < hot_end_) swap_slots(connection.slot, --hot_end_);
    swap_slots(connection.slot, fds_.size() - 1);
    fds_.pop_back();
    const auto gone = std::move(connections_.back());
    connections_.pop_back();
    pause_.set(kNever);
  }
  void lose(Connection& connection) {
    connection.session->port.dropped = true;
    connection.session->ended({});
    attend(connection);
  }

  void accept_from(const Listener& listener) {
    static constexpr int kYes = 1;
    for (int most = 64; most > 0; --most) {
      SocketAddress peer;
      const bool full = connections() >= most_connections_;
      Fd fd(full ? -1 : ::accept4(listener.fd.get(), peer.get(), &peer.size, SOCK_CLOEXEC));
      const bool lacking = errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM;
      if (full || (!fd && lacking)) return pause_accepting();
      if (!fd && errno == EAGAIN) return;
      if (!fd) continue;
      ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &kYes, sizeof kYes);  // fails on a Unix socket: never mind
      guard(nullptr, [&] { add(listener.greet(peer.text()), State::kOpen, std::move(fd)); });
    }
  }
  /// Those who are here go on, and the next ones wait in the kernel's queue until one goes, or for a second.
  void pause_accepting() {
    broker_.logger.say(Level::kWarning, "no more clients until one leaves: there is no descriptor or memory for them");
    pause_.set(broker_.now.steady + kSecond);
  }

  void connect_to_next(Connection& connection) {
    while (!connection.untried.empty()) {
      const SocketAddress address = connection.untried.back();
      connection.untried.pop_back();
      Fd fd = open_socket(address.family());
      if (!fd || (::connect(fd.get(), address.get(), address.size) != 0 && errno != EINPROGRESS)) continue;
      fds_[connection.slot] = {fd.get(), POLLOUT, 0};
      connection.fd = std::move(fd);
      return;
    }
    lose(connection);
  }
  void finish_connecting(Connection& connection) {
    int code = 0;
    socklen_t size = sizeof code;
    ::getsockopt(connection.fd.get(), SOL_SOCKET, SO_ERROR, &code, &size);
    if (code != 0) return connect_to_next(connection);  // localhost may be two places, and a server on one of them only
    connection.state = State::kOpen;
    connection.session->connected();
    attend(connection);
  }

  // ---- reading
  void serve(Connection& connection, short events) {
    const bool again = broker_.now.steady - std::exchange(connection.active, broker_.now.steady) < 3 * look_every_;
    if (again && connection.slot >= hot_end_) swap_slots(connection.slot, hot_end_++);
    if (connection.session->port.dropped) return;
    if (connection.state == State::kConnecting) finish_connecting(connection);
    else if ((events & POLLIN) != 0) guard(&connection, [&] { read(connection); });
    else if ((events & (POLLERR | POLLHUP | POLLNVAL)) != 0) lose(connection);
    if ((events & POLLOUT) != 0) attend(connection);
  }
  /// Where there is no memory for a connection, the connection ends and not the daemon.
  template <typename Work>
  void guard(Connection* connection, const Work& work) {
    try {
      return work();
    } catch (const std::bad_alloc&) {
      if (connection != nullptr) std::string().swap(connection->input);
    }
    broker_.logger.say(Level::kError, "out of memory: a connection is closed");
    if (connection == nullptr) return;  // a new one
    connection->session->port.dropped = true;
    attend(*connection);
  }
  static bool passing(int code) { return code == EAGAIN || code == EWOULDBLOCK || code == EINTR || code == ENOBUFS; }

  /// Reads once. A buffer of the connection's own grows with what has arrived, never ahead of it.
  void read(Connection& connection) {
    const ssize_t got = ::recv(connection.fd.get(), arrived_.data(), arrived_.size(), MSG_DONTWAIT);
    if (got < 0) return passing(errno) ? void() : lose(connection);
    if (got == 0) connection.state = State::kEnded;
    const std::string_view arrived(arrived_.data(), static_cast<size_t>(got));
    if (connection.input.empty()) return feed(connection, arrived);
    feed(connection, connection.input += arrived);
  }
  /// What the session has not done with is kept.
  void feed(Connection& connection, std::string_view input) {
    Session& session = *connection.session;
    auto deaf = [&session] { return session.port.closing || session.port.dropped; };
    const bool ended = connection.state == State::kEnded;
    size_t used = session.parked || deaf() ? 0 : session.feed(input);
    if (!session.parked && !deaf() && (ended || session.late)) {
      session.ended(input.substr(used));
      used = input.size();
    }
    if (deaf() || used == input.size()) std::string().swap(connection.input);
    else if (input.data() == connection.input.data()) connection.input.erase(0, used);
    else connection.input.assign(input.substr(used));
    if (ended || session.parked || deaf()) attend(connection);
  }
  /// Sessions that were woken by something else than input: an answer that they waited for, or their time being up.
  void feed_attended() {
    for (size_t i = 0; i < attended_.size(); ++i) {
      Connection& connection = *attended_[i];
      Session& session = *connection.session;
      if (session.parked || !(std::exchange(session.resumed, false) || session.late)) continue;
      guard(&connection, [&] { feed(connection, connection.input); });
    }
  }

  // ---- writing
  void write_attended() {
    writing_.swap(attended_);
    for (Connection* connection : writing_) {
      connection->attended = false;
      if (!connection->session->port.dropped) guard(connection, [&] { write(*connection); });
      const bool closed = connection->session->port.dropped && !std::exchange(connection->attended, true);
      if (closed) closed_.push_back(connection);  // unless it is listed again: then in the next turn
    }
    writing_.clear();
  }
  void write(Connection& connection) {
    if (connection.state == State::kConnecting) return;
    if (connection.state == State::kInside) return connection.session->drained();
    Session& session = *connection.session;
    Output& out = session.port.out;
    if (!out.empty()) {
      std::array<iovec, 256> pieces;
      msghdr message{};
      message.msg_iov = pieces.data();
      message.msg_iovlen = out.gather(pieces.data(), pieces.size());
      const ssize_t sent = ::sendmsg(connection.fd.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
      const bool lost = sent < 0 && !passing(errno);
      const size_t done = lost ? out.size() : static_cast<size_t>(std::max<ssize_t>(sent, 0));
      out.settle(done);
      if (lost) return lose(connection);
      session.written += done;
      session.drained();
    }
    const size_t waiting = out.size() + (session.parked ? connection.input.size() : 0);
    const bool hears = connection.state == State::kOpen && waiting < kMostUnread;
    fds_[connection.slot].events = static_cast<short>((hears ? POLLIN : 0) | (out.empty() ? 0 : POLLOUT));
    if (!session.port.closing || !out.empty()) return;
    if (connection.state != State::kOpen || ::shutdown(connection.fd.get(), SHUT_WR) != 0) session.port.dropped = true;
    else give(connection, std::make_shared<Silence>(broker_.timers, broker_.now.steady + kLinger));
  }

  Broker& broker_;
  Timer pause_;  // set: nobody is accepted before that time
  size_t most_connections_ = 0;  // some descriptors are kept back for files and peers
  std::string arrived_;
  Fd wake_read_, wake_write_;
  std::vector<std::unique_ptr<Listener>> listeners_;
  std::vector<pollfd> fds_;  // the wake-up pipe, the listeners, the busy connections, and from hot_end_ on the others
  std::vector<std::shared_ptr<Connection>> connections_;
  size_t hot_end_ = 1;
  int64_t next_look_ = 0, look_every_ = kMillisecond;  // at all connections, while some are busy
  std::vector<Connection*> attended_, writing_, closed_;
  std::mutex mutex_;  // for the tasks
  std::vector<std::function<void()>> tasks_;
  bool takes_tasks_ = false;
};

// ---------------------------------------------------------------------------------------------------------------------
// [15] The daemon
//
// Joins the parts: what is locked, bound and loaded at the start, what a turn makes durable, and in which order all
// ends. And the consumers and publishers inside the process, who reach the loop by posting tasks to it.
// Always: everything but Loop::post, the ports and RemovedFiles is touched by the loop's thread only, from start to the end
// of stop.
// ---------------------------------------------------------------------------------------------------------------------

/// A consumer inside the process: a session without a socket, whose output is taken apart into messages.
struct LocalConsumer : Session {
  explicit LocalConsumer(Engine& of) : engine(of) { port.session = this; }
  size_t feed(std::string_view input) override { return input.size(); }
  void ended(std::string_view) override {
    if (port.consumer != nullptr) port.consumer->channel.unsubscribe(*port.consumer, true);
    const std::lock_guard<std::mutex> lock(mutex);
    closed = true;
    wake.notify_all();
  }
  /// On the loop's thread: passes on what the channel has delivered.
  void drained() override {
    const std::string bytes = port.out.take();
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t at = 0, size = 0; at < bytes.size(); at += size) {
      const char* frame = &bytes[at];  // size 4, type 4, timestamp 8, attempts 2, id 16, body
      size = 4 + size_t{get_be<uint32_t>(frame)};
      messages.push_back({bytes.substr(at + 18, 16), bytes.substr(at + 34, size - 34),
                          static_cast<int64_t>(get_be<uint64_t>(frame + 8)), get_be<uint16_t>(frame + 16)});
    }
    wake.notify_all();
  }
  ClientStats stats() const override {
    if (port.consumer == nullptr) return {};
    ClientStats shown;
    port.consumer->count_in(shown);
    shown.client_id = shown.hostname = host_name();
    shown.user_agent = text("nsqd.hpp/", kVersion);
    shown.remote_address = "@";
    shown.state = kSubscribed;
    shown.connected_at = since.wall / kSecond;
    shown.connected_for = port.consumer->channel.topic.broker.now.steady - since.steady;
    return shown;
  }
  using Action = std::function<std::string_view(Consumer& consumer, const MessageId& id)>;
  /// From any thread: does something with a message in flight, and tells whether that was possible.
  bool answer(const Message& message, const Action& action);

  Engine& engine;
  Now since;
  std::mutex mutex;  // for what follows
  std::condition_variable wake;
  std::deque<Message> messages;
  std::atomic<bool> closed{false};
};

/// Refuses settings that cannot work, and fills in those that depend on the host.
inline void complete_options(Options& options);

class Engine {
 public:
  explicit Engine(Options given)
      : options_(completed(std::move(given))), logger_(options_),
        directory_(options_.mem_only ? "" : options_.data_path.empty() ? "." : options_.data_path),
        lock_(options_.mem_only ? nullptr : std::make_unique<DirectoryLock>(directory_)),
        broker_(options_, logger_, directory_), host_(broker_, options_, logger_), loop_(broker_),
        cluster_(broker_, [this](const auto& address, const auto& session) { loop_.dial(address, session, *worker_); }),
        sync_timer_(broker_.timers, [this] { sync_due_ = true; }),
        statsd_timer_(broker_.timers, [this] { push_statsd(); }) {
    logger_.say(Level::kInfo, build_text());
    logger_.say(Level::kInfo, "ID: ", options_.node_id);
    connect_host();
    listen();
    if (!options_.mem_only) recover();
  }
  ~Engine() { stop(); }

  void start() {
    const std::lock_guard<std::mutex> lock(start_and_stop_);
    if (thread_.joinable() || worker_ == nullptr) throw std::runtime_error("a daemon starts only once");
    for (const auto& listener : loop_.listeners())
      logger_.say(Level::kInfo, listener->kind, ": listening on ", listener->shown);
    broker_.on_change = [this](auto& topic, auto* channel, bool created) { cluster_.tell(topic, channel, created); };
    loop_.take_tasks(true);
    thread_ = std::thread([this] { run(); });
  }
  void stop() {
    const std::lock_guard<std::mutex> lock(start_and_stop_);
    if (!thread_.joinable()) return;
    loop_.post([this] { ending_ = true; });
    thread_.join();
    logger_.say(Level::kInfo, "NSQ: stopping subsystems");
    worker_.reset();
    lock_.reset();
    logger_.say(Level::kInfo, "NSQ: bye");
  }
  int tcp_port() const { return host_.tcp_port; }
  int http_port() const { return host_.http_port; }

  /// Runs a task on the loop's thread and waits until its turn is over, so that what it has changed is as durable as
  /// the options ask for. False when the daemon does not run.
  bool try_on_loop(std::function<void()> task) {
    auto done = std::make_shared<std::promise<void>>();
    auto result = done->get_future();
    loop_.post([this, task = std::move(task), done = std::move(done)] {
      task();
      after_turn_.push_back(done);
    });
    try {
      return result.get(), true;
    } catch (const std::future_error&) { return false; }  // the task was thrown away
  }
  void on_loop(std::function<void()> task) {
    if (!try_on_loop(std::move(task))) throw std::runtime_error("the daemon is not running");
  }

  // ---- for publishers, consumers and administrators in the process, from any thread
  void publish(std::string_view topic, const std::string_view* bodies, size_t count, Duration delay) {
    check_name(topic);
    for (size_t i = 0; i < count; ++i)
      if (bodies[i].empty() || bodies[i].size() > static_cast<size_t>(options_.max_msg_size))
        throw std::invalid_argument(text("a message has 1 to ", options_.max_msg_size, " bytes"));
    if (delay < Duration::zero() || delay > options_.max_req_timeout)
      throw std::invalid_argument("a delay is from 0 to max_req_timeout");
    Status status;
    on_loop([&] { status = broker_.topic(topic).publish(bodies, count, delay.count()); });
    throw_unless(status);
  }
  void create(std::string_view topic, std::string_view channel, const std::function<void(Channel&)>& action = nullptr) {
    check_name(topic);
    check_name(channel);
    Status status;
    on_loop([&] {
      Channel* made = broker_.topic(topic).channel(channel, status);
      if (made != nullptr && action) action(*made);
    });
    throw_unless(status);
  }
  void create(std::string_view topic) {
    check_name(topic);
    on_loop([&] { broker_.topic(topic); });
  }
  void subscribe(const std::shared_ptr<LocalConsumer>& by, std::string_view topic, std::string_view channel, int most) {
    create(topic, channel, [&](Channel& made) {
      loop_.adopt(by);
      by->since = broker_.now;
      const auto distance = topology_aware(options_) ? Consumer::kSameZone : Consumer::kElsewhere;
      made.set_ready(made.subscribe(by->port, distance, options_.msg_timeout), most);
    });
  }
  /// Does something with a topic or channel, and tells whether it was there.
  template <typename Action>
  bool with(std::string_view topic, const Action& action) {
    Topic* found = nullptr;
    on_loop([&] {
      if ((found = broker_.find(topic)) != nullptr) action(*found);
    });
    return found != nullptr;
  }
  template <typename Action>
  bool with(std::string_view topic, std::string_view channel, const Action& action) {
    Channel* found = nullptr;
    with(topic, [&](Topic& parent) {
      if ((found = parent.find(channel)) != nullptr) action(*found);
    });
    return found != nullptr;
  }
  Stats stats() {
    Stats stats;
    on_loop([&] { stats = take_stats(host_, {}); });
    return stats;
  }

 private:
  static void check_name(std::string_view name) {
    static constexpr std::string_view kRule = ": it has 1 to 64 letters, digits and . _ -, and may end in #ephemeral";
    if (!valid_name(name)) throw std::invalid_argument(text("invalid name ", quoted(name), kRule));
  }

  // ---- the start
  static Options completed(Options options) {
    complete_options(options);
    return options;
  }
  void connect_host() {
    host_.started_wall = broker_.now.wall;
    host_.ask_auth = [this](V2Session& session) {
      const auto random = static_cast<size_t>(broker_.now.wall / kMicrosecond);
      cluster_.ask_auth(session, random, options_.auth_http_address.size());
    };
    host_.look_up = [this](std::string_view topic, Session& session) { return cluster_.look_up(topic, session); };
    host_.connections = [this] { return loop_.connections(); };
    host_.set_lookupds = [this](std::vector<std::string> addresses) {
      options_.lookupd_tcp_address = std::move(addresses);
      cluster_.set_peers(options_.lookupd_tcp_address);
    };
    host_.each_session = [this](const std::function<void(const Session&)>& visit) { loop_.each_session(visit); };
  }
  void listen() {
    auto tcp = [this](const std::string& peer) {
      logger_.say(Level::kInfo, "TCP: new client(", peer, ")");
      const auto split = split_address(peer);
      return std::make_shared<V2Session>(host_, peer, split ? split->first : "");
    };
    auto http = [this](const std::string& peer) { return std::make_shared<HttpSession>(host_, peer); };
    host_.tcp_port = loop_.listen("TCP", options_.tcp_address, tcp);
    if (!options_.http_address.empty()) host_.http_port = loop_.listen("HTTP", options_.http_address, http);
    if (options_.broadcast_tcp_port == 0) options_.broadcast_tcp_port = host_.tcp_port;
    if (options_.broadcast_http_port == 0) options_.broadcast_http_port = host_.http_port;
    std::string host = text(options_.broadcast_address, ":", options_.broadcast_http_port);
    std::replace_if(host.begin(), host.end(), [](char c) { return c == '.' || c == ':'; }, '_');
    std::string& prefix = options_.statsd_prefix;
    for (size_t at = 0; (at = prefix.find("%s", at)) != prefix.npos; at += host.size()) prefix.replace(at, 2, host);
    if (!prefix.empty() && prefix.back() != '.') prefix += '.';
  }
  void recover() {
    Recovery(broker_).run();
    const Status status = replace_file(directory_, "nsqd.dat", broker_.metadata().json());
    broker_.metadata_changed = broker_.metadata_awaited = false;
    if (!status.ok()) throw std::runtime_error(text("failed to persist metadata - ", status.error,
                                                    " (--data-path must be a directory that can be written to)"));
  }

  // ---- the loop's thread
  void run() {
    block_signals();
    cluster_.set_peers(options_.lookupd_tcp_address);
    if (!options_.statsd_address.empty()) statsd_timer_.set(broker_.now.steady + options_.statsd_interval.count());
    while (!ending_) loop_.turn([this] { make_durable(); });
    // Listeners, clients, metadata, topics, subsystems: the order in which nsqd ends.
    loop_.close_listeners("TCP");
    loop_.close_connections();
    loop_.close_listeners("HTTP");
    write_metadata(true);
    logger_.say(Level::kInfo, "NSQ: closing topics");
    broker_.close();
    broker_.on_change = nullptr;
    if (!options_.lookupd_tcp_address.empty()) logger_.say(Level::kInfo, "LOOKUP: closing");
    cluster_.set_peers({});
    if (!options_.statsd_address.empty()) logger_.say(Level::kInfo, "STATSD: closing");
    loop_.take_tasks(false);
  }
  void push_statsd() {
    statsd_timer_.set(broker_.now.steady + options_.statsd_interval.count());
    worker_->post([this, packets = statsd_.packets(take_stats(host_, {{}, {}, false}), options_)] {
      std::vector<SocketAddress> found;
      const Status status = resolve(options_.statsd_address, SOCK_DGRAM, 0, found);
      if (found.empty()) return loop_.post([this, status] { logger_.say(Level::kError, "STATSD: ", status.error); });
      const Fd fd = open_socket(found[0].family(), SOCK_DGRAM);
      for (const std::string& packet : packets)  // what the network does not take is lost, as UDP has it
        ::sendto(fd.get(), packet.data(), packet.size(), MSG_NOSIGNAL, found[0].get(), found[0].size);
    });
  }

  // ---- what a turn makes durable
  /// Before a turn's answers go out. Only what somebody waits for is waited for here; the worker does the rest.
  void make_durable() {
    const bool awaited = broker_.metadata_awaited;
    if (awaited || (broker_.metadata_changed && !writing_metadata_)) write_metadata(awaited);
    if (!broker_.storage.dirty.empty()) sync_in_time();
    if (broker_.storage.removed.more()) worker_->post([this] { broker_.storage.removed.close(); });
    for (const auto& done : std::exchange(after_turn_, {})) done->set_value();
  }
  /// The worker does the job; then `note` is called here: before this returns if it is awaited, else in a later turn.
  void store(bool awaited, bool& busy, std::function<Status()> job, std::function<void(const Status&)> note) {
    if (awaited) {
      const auto done = std::make_shared<std::promise<Status>>();
      worker_->post([&job, done] { done->set_value(job()); });
      return note(done->get_future().get());
    }
    busy = true;
    worker_->post([this, &busy, job = std::move(job), note = std::move(note)] {
      loop_.post([&busy, note, status = job()] {
        busy = false;
        note(status);
      });
    });
  }

  void write_metadata(bool awaited) {
    broker_.metadata_changed = broker_.metadata_awaited = false;
    if (options_.mem_only) return;
    logger_.say(Level::kInfo, "NSQ: persisting topic/channel metadata to ", directory_, "/nsqd.dat");
    auto write = [this, json = broker_.metadata().json()] { return replace_file(directory_, "nsqd.dat", json); };
    store(awaited, writing_metadata_, write, [this](const Status& status) {
      if (!status.ok()) logger_.say(Level::kError, "failed to persist metadata - ", status.error);
    });
  }
  /// After --sync-every operations, or --sync-timeout after the first one. Where the disk is too slow for that, syncing
  /// takes a tenth of the time, so that it is the publishers who get the rest.
  void sync_in_time() {
    if (options_.sync_every <= 1) return sync(true);
    if (syncing_) return;
    const int64_t now = broker_.now.steady, timeout = options_.sync_timeout.count();
    const bool many = broker_.storage.operations >= static_cast<uint64_t>(options_.sync_every);
    if (sync_due_ || (many && now >= next_sync_)) return sync(false);
    const int64_t in_time = timeout > 0 ? saturating_add(now, timeout) : kNever;
    sync_timer_.set(std::min({sync_timer_.due(), in_time, many ? next_sync_ : kNever}));
  }
  /// Gives up when the daemon ends: what is not synced then is no more than what a power cut might have taken before.
  void sync(bool awaited) {
    Storage& storage = broker_.storage;
    ++storage.epoch;  // what is touched from here on belongs to the next time
    storage.operations = 0;
    sync_due_ = false;
    sync_timer_.set(kNever);
    auto paths = std::exchange(storage.dirty, {});
    if (std::exchange(storage.new_names, false)) paths.push_back(directory_);
    auto sync_all = [this, awaited, paths = std::move(paths)] {
      Status status;
      for (const std::string& path : paths)
        if (status.ok() && (awaited || !ending_)) status = sync_file(path);
      return status;
    };
    store(awaited, syncing_, std::move(sync_all), [this, begun = broker_.now.steady](const Status& status) {
      next_sync_ = broker_.now.steady + 9 * (broker_.now.steady - begun);
      if (!status.ok()) logger_.say(Level::kError, "failed to sync - ", status.error);
      broker_.storage.unsynced = status.error;
    });
  }

  Options options_;
  Logger logger_;
  const std::string directory_;  // empty: nothing is kept
  std::unique_ptr<DirectoryLock> lock_;
  Broker broker_;
  Host host_;
  std::unique_ptr<Worker> worker_ = std::make_unique<Worker>();
  Loop loop_;
  Cluster cluster_;
  StatsdFeed statsd_;
  Timer sync_timer_, statsd_timer_;
  std::atomic<bool> ending_{false};  // for the loop, and for the worker: it does not begin another fsync
  int64_t next_sync_ = 0;            // not before that time
  bool writing_metadata_ = false, syncing_ = false, sync_due_ = false;
  std::vector<std::shared_ptr<std::promise<void>>> after_turn_;
  std::mutex start_and_stop_;
  std::thread thread_;
};

inline bool LocalConsumer::answer(const Message& message, const Action& action) {
  if (message.id.size() != 16 || closed) return false;
  bool done = false;
  return engine.try_on_loop([&] {
    done = port.consumer != nullptr && action(*port.consumer, MessageId::from(message.id.data())).empty();
  }) && done;
}

}  // namespace nsqd::detail

namespace nsqd {

inline Subscription::Subscription(Subscription&&) noexcept = default;
inline Subscription& Subscription::operator=(Subscription&& other) noexcept {
  std::swap(consumer_, other.consumer_);
  return *this;
}
inline Subscription::~Subscription() {
  if (consumer_ == nullptr || consumer_->closed) return;
  consumer_->engine.try_on_loop([consumer = consumer_] {
    consumer->ended({});
    consumer->port.dropped = true;
    consumer->port.attend();
  });
}

inline std::optional<Message> Subscription::next(Duration timeout) {
  std::unique_lock<std::mutex> lock(consumer_->mutex);
  consumer_->wake.wait_for(lock, timeout, [this] { return consumer_->closed || !consumer_->messages.empty(); });
  if (consumer_->messages.empty()) return std::nullopt;
  Message message = std::move(consumer_->messages.front());
  consumer_->messages.pop_front();
  return message;
}

inline bool Subscription::finish(const Message& message) {
  return consumer_->answer(message, [](auto& consumer, auto& id) { return consumer.channel.finish(consumer, id); });
}
inline bool Subscription::requeue(const Message& message, Duration delay) {
  return consumer_->answer(message, [delay](auto& consumer, const auto& id) {
    const Duration most = consumer.channel.topic.broker.options.max_req_timeout;
    return consumer.channel.requeue(consumer, id, std::clamp(delay, Duration::zero(), most).count());
  });
}
inline bool Subscription::touch(const Message& message) {
  return consumer_->answer(message, [](auto& consumer, const auto& id) {
    return consumer.channel.touch(consumer, id, consumer.msg_timeout);
  });
}

inline Daemon::Daemon(Options options) : engine_(std::make_unique<detail::Engine>(std::move(options))) {}
inline Daemon::~Daemon() = default;
inline void Daemon::start() { engine_->start(); }
inline void Daemon::stop() { engine_->stop(); }
inline int Daemon::tcp_port() const { return engine_->tcp_port(); }
inline int Daemon::http_port() const { return engine_->http_port(); }
inline Stats Daemon::stats() const { return engine_->stats(); }

inline void Daemon::publish(std::string_view topic, std::string_view body) { publish_deferred(topic, body, {}); }
inline void Daemon::publish(std::string_view topic, const std::vector<std::string>& bodies) {
  const std::vector<std::string_view> views(bodies.begin(), bodies.end());
  engine_->publish(topic, views.data(), views.size(), Duration::zero());
}
inline void Daemon::publish_deferred(std::string_view topic, std::string_view body, Duration delay) {
  engine_->publish(topic, &body, 1, delay);
}
inline Subscription Daemon::subscribe(std::string_view topic, std::string_view channel, int max_in_flight) {
  auto consumer = std::make_shared<detail::LocalConsumer>(*engine_);
  engine_->subscribe(consumer, topic, channel, max_in_flight);
  return Subscription(std::move(consumer));
}

inline void Daemon::create_topic(std::string_view topic) { engine_->create(topic); }
inline void Daemon::create_channel(std::string_view topic, std::string_view name) { engine_->create(topic, name); }
inline bool Daemon::delete_topic(std::string_view topic) {
  return engine_->with(topic, [](detail::Topic& found) { found.broker.delete_topic(found); });
}
inline bool Daemon::empty_topic(std::string_view topic) { return engine_->with(topic, [](auto& t) { t.empty(); }); }
inline bool Daemon::pause_topic(std::string_view topic, bool paused) {
  return engine_->with(topic, [paused](detail::Topic& found) { found.pause(paused); });
}
inline bool Daemon::delete_channel(std::string_view topic, std::string_view channel) {
  return engine_->with(topic, channel, [](detail::Channel& found) { found.topic.delete_channel(found); });
}
inline bool Daemon::empty_channel(std::string_view topic, std::string_view channel) {
  return engine_->with(topic, channel, [](detail::Channel& found) { found.empty(); });
}
inline bool Daemon::pause_channel(std::string_view topic, std::string_view channel, bool paused) {
  return engine_->with(topic, channel, [paused](detail::Channel& found) { found.pause(paused); });
}

}  // namespace nsqd

// ---------------------------------------------------------------------------------------------------------------------
// [16] Options from flags and file
//
// One table names every flag, what it sets and its meaning. Flags are read as Go reads them, the file as TOML.
// Always: a flag wins over the file, and the file over the default; what cannot be read stops the start and is named.
// ---------------------------------------------------------------------------------------------------------------------

namespace nsqd::detail {

using Texts = std::vector<std::string>;
using Numbers = std::vector<double>;

/// The options, and what else the flags say.
struct Given : Options {
  bool version = false, ignored = false;
  std::string config = {};
  std::set<std::string_view> flags = {};  // by name
};

/// A flag and what it sets. Its key in the file and in GET /config is its name with underscores, or own_key; "-": none.
struct Flag {
  std::string_view name;
  std::variant<bool Given::*, int64_t Given::*, Duration Given::*, Level Given::*, std::string Given::*, Texts Given::*,
               Numbers Given::*> target;
  std::string_view help, own_key = {};

  template <typename Value>
  bool sets() const { return std::holds_alternative<Value Given::*>(target); }
  bool is_bool() const { return sets<bool>() || name == "tls-required"; }
  std::string key() const {
    std::string key(own_key.empty() ? name : own_key);
    std::replace(key.begin(), key.end(), '-', '_');
    return key;
  }
};

inline const auto& flags() {
  using O = Given;
  static const Flag kFlags[] = {
      {"version", &O::version, "print the version and exit", "-"},
      {"config", &O::config, "path of a config file (TOML)", "-"},
      {"verbose", &O::ignored, "has no effect; use --log-level", "-"},
      {"worker-id", &O::ignored, "has no effect; use --node-id", "-"},
      {"tcp-address", &O::tcp_address, "where TCP clients connect: <host>:<port>, or the path of a unix socket"},
      {"http-address", &O::http_address, "where HTTP clients connect, likewise; empty: no HTTP"},
      {"https-address", &O::https_address, "shown, and not used: there is no TLS here"},
      {"broadcast-address", &O::broadcast_address, "the name that nsqlookupd is told (default: the host's name)"},
      {"broadcast-tcp-port", &O::broadcast_tcp_port, "the TCP port that it is told (default: the one listened on)"},
      {"broadcast-http-port", &O::broadcast_http_port, "the HTTP port that it is told (default: the one listened on)"},
      {"data-path", &O::data_path, "directory of everything that is kept (default: the current one)"},
      {"mem-only", &O::mem_only, "keep nothing: no data path, no lock, no files"},
      {"mem-queue-size", &O::mem_queue_size, "messages per queue that is in memory only (ephemerals, --mem-only)"},
      {"max-bytes-per-file", &O::max_bytes_per_file, "largest segment file, in bytes"},
      {"sync-every", &O::sync_every, "messages and finishes per fsync; 1: a publish is answered after its fsync"},
      {"sync-timeout", &O::sync_timeout, "fsync at least this often when something changed; 0: never by time"},
      {"msg-timeout", &O::msg_timeout, "time a consumer has for a message before it is requeued"},
      {"max-msg-timeout", &O::max_msg_timeout, "longest such time that a client may ask for, and reach by TOUCH"},
      {"max-msg-size", &O::max_msg_size, "largest message, in bytes"},
      {"max-body-size", &O::max_body_size, "largest body of a command, in bytes"},
      {"max-req-timeout", &O::max_req_timeout, "longest delay of REQ, DPUB and defer="},
      {"max-heartbeat-interval", &O::max_heartbeat_interval, "longest time between heartbeats for a client to ask for"},
      {"max-rdy-count", &O::max_rdy_count, "largest RDY"},
      {"max-output-buffer-size", &O::max_output_buffer_size, "largest output buffer for a client to ask for, in bytes"},
      {"max-output-buffer-timeout", &O::max_output_buffer_timeout, "longest time for a client to let output wait"},
      {"min-output-buffer-timeout", &O::min_output_buffer_timeout, "shortest such time"},
      {"output-buffer-timeout", &O::output_buffer_timeout, "the time of clients that ask for none"},
      {"max-channel-consumers", &O::max_channel_consumers, "consumers per channel; 0: no limit"},
      {"node-id", &O::node_id, "0 to 1023, part of every message id (default: a hash of the host's name)", "id"},
      {"lookupd-tcp-address", &O::lookupd_tcp_address, "an nsqlookupd, <host>:<port> (*)", "nsqlookupd_tcp_addresses"},
      {"auth-http-address", &O::auth_http_address, "an auth server, <host>:<port> or URL (*)", "auth_http_addresses"},
      {"auth-http-request-method", &O::auth_http_request_method, "how it is asked: get or post"},
      {"http-client-connect-timeout", &O::http_client_connect_timeout, "to connect to an auth server or nsqlookupd"},
      {"http-client-request-timeout", &O::http_client_request_timeout, "for the whole request"},
      {"topology-region", &O::topology_region, "region of this daemon"},
      {"topology-zone", &O::topology_zone, "zone of this daemon"},
      {"enable-experiment", &O::enable_experiment, "topology-aware-consumption (*)"},
      {"log-level", &O::log_level, "debug, info (the default), warn, error or fatal"},
      {"log-prefix", &O::log_prefix, "start of each log line"},
      {"statsd-address", &O::statsd_address, "where statistics are pushed to, <host>:<port>; empty: nowhere"},
      {"statsd-prefix", &O::statsd_prefix, "start of each metric's name; %s stands for the host and port"},
      {"statsd-interval", &O::statsd_interval, "time between two pushes"},
      {"statsd-mem-stats", &O::statsd_mem_stats, "push memory figures"},
      {"statsd-udp-packet-size", &O::statsd_udp_packet_size, "largest packet, in bytes"},
      {"statsd-exclude-ephemeral", &O::statsd_exclude_ephemeral, "leave out ephemeral topics and channels"},
      {"e2e-processing-latency-percentile", &O::e2e_processing_latency_percentile,
       "shares of the time from publish to finish, like 0.5,0.99 (*)", "e2e_processing_latency_percentiles"},
      {"e2e-processing-latency-window-time", &O::e2e_processing_latency_window_time, "time that they are taken over"},
      {"deflate", &O::deflate, "shown, and not used: clients are told that there is no compression"},
      {"snappy", &O::snappy, "likewise"},
      {"max-deflate-level", &O::max_deflate_level, "likewise, 1 to 9"},
      {"tls-cert", &O::tls_cert, "refused: there is no TLS here"},
      {"tls-key", &O::tls_key, "refused"},
      {"tls-root-ca-file", &O::tls_root_ca_file, "refused"},
      {"tls-client-auth-policy", &O::tls_client_auth_policy, "refused"},
      {"tls-required", &O::tls_required, "refused, but for false"},
      {"tls-min-version", &O::tls_min_version, "tls1.0 (the default), tls1.1, tls1.2 or tls1.3; shown, and not used"},
      {"queue-scan-worker-pool-max", &O::queue_scan_worker_pool_max, "shown, and not used: nothing is scanned here"},
      {"queue-scan-selection-count", &O::queue_scan_selection_count, "likewise"},
  };
  return kFlags;
}

/// The flag of that name or, in the file, of that key; null where there is none.
inline const Flag* find_flag(std::string_view word, bool in_file = false) {
  for (const Flag& flag : flags())
    if (in_file ? flag.own_key != "-" && flag.key() == word : flag.name == word) return &flag;
  return nullptr;
}

// ---- Words: each function sets a value from a word of the user, and returns whether it could ------------------------

/// The value is `first` and the place of the word, in any case, in a list whose meanings repeat after `period` words.
template <typename Value>
bool choose(std::string_view word, Value& value, std::initializer_list<std::string_view> words, int period, int first) {
  const auto* found = std::find_if(words.begin(), words.end(), [word](auto known) { return same_word(word, known); });
  value = static_cast<Value>(first + (found - words.begin()) % period);
  return found != words.end();
}
inline bool parse_word(std::string_view word, bool& value) {
  return choose(word, value, {"0", "1", "f", "t", "false", "true"}, 2, 0);
}
inline bool parse_word(std::string_view word, Level& value) {
  return choose(word, value, {"debug", "info", "warn", "error", "fatal"}, 5, 1);
}
inline bool parse_word(std::string_view word, std::string& value) { return value = word, true; }
inline bool parse_word(std::string_view word, Texts& values) { return values.emplace_back(word), true; }
/// As Go reads it: with a sign, 0x, 0o, 0b or 0 for another base, and underscores.
inline bool parse_word(std::string_view word, int64_t& value) {
  std::string digits = take_sign(word) ? "-" : "+";
  const char kind = word.size() > 1 && word[0] == '0' ? lower(word[1]) : '-';
  take_front(word, kind == 'x' || kind == 'o' || kind == 'b' ? 2 : 0);
  std::remove_copy(word.begin(), word.end(), std::back_inserter(digits), '_');
  const auto number = decimal(digits, true, kind == '-' ? 10 : kind == 'x' ? 16 : kind == 'b' ? 2 : 8);
  value = number.value_or(0);
  return number.has_value();
}
inline bool parse_word(std::string_view word, double& value) {
  const std::string digits(word);
  char* end = nullptr;
  value = std::strtod(digits.c_str(), &end);
  return !digits.empty() && *end == '\0' && !std::isnan(value);
}
/// As Go reads it: a sign, then numbers with units; only 0 goes without. A double holds 100 days to the nanosecond.
inline bool parse_word(std::string_view word, Duration& value) {
  static constexpr std::array<double, 8> kUnits = {1, 1e3, 1e3, 1e3, 1e6, 1e9, 60e9, 3600e9};
  const double sign = take_sign(word) ? -1 : 1;
  double count = 0, total = 0;
  size_t unit = 0;
  if (word == "0") word = "0s";
  do {
    const std::string_view number = take_front(word, word.find_first_not_of(".0123456789"));
    const std::string_view name = take_front(word, word.find_first_of(".0123456789"));
    const bool known = choose(name, unit, {"ns", "us", "\xC2\xB5s", "\xCE\xBCs", "ms", "s", "m", "h"}, 8, 0);
    if (!known || !parse_word(number, count)) return false;
    total += sign * count * kUnits[unit];
  } while (!word.empty());
  value = Duration(std::llround(std::clamp(total, -9.22e18, 9.22e18)));
  return std::abs(total) < 9.22e18;
}
inline Texts split_at_commas(std::string_view list) {
  Texts parts;
  for (; !list.empty(); list.remove_prefix(list.empty() ? 0 : 1)) parts.emplace_back(take_front(list, list.find(',')));
  return parts;
}
inline bool parse_word(std::string_view word, Numbers& values) {
  const Texts parts = split_at_commas(word);
  return std::all_of(parts.begin(), parts.end(), [&](auto& part) { return parse_word(part, values.emplace_back()); });
}
inline std::optional<Level> parse_level(std::string_view word) {
  Level level = Level::kInfo;
  return parse_word(word, level) ? std::optional(level) : std::nullopt;
}

inline bool set_option(Given& given, const Flag& flag, std::string_view word) {
  if (flag.name == "tls-required")
    return choose(word, given.tls_required, {"0", "tcp-https", "1", "f", "", "t", "false", "", "true"}, 3, 0);
  if (flag.name == "tls-min-version")  // TLS's own numbers
    return choose(word, given.tls_min_version, {"tls1.0", "tls1.1", "tls1.2", "tls1.3", ""}, 4, 769);
  return std::visit([&](auto member) { return parse_word(word, given.*member); }, flag.target);
}

inline std::optional<ShownOption> show_option(const Options& options, std::string_view key) {
  const Flag* flag = find_flag(key, true);
  if (flag == nullptr) return std::nullopt;
  auto show = [given = Given{options}](auto member) -> ShownOption {
    const auto& value = given.*member;
    using Value = std::decay_t<decltype(value)>;
    if constexpr (std::is_same_v<Value, std::string>) return {value, false};
    else if constexpr (std::is_same_v<Value, Duration>) return {std::to_string(value.count())};
    else if constexpr (std::is_same_v<Value, Level>) return {std::to_string(static_cast<int>(value))};
    else return {JsonWriter().value(value).out};
  };
  return std::visit(show, flag->target);
}

// ---- The command line -----------------------------------------------------------------------------------------------

inline std::string usage() {
  std::string out = text(
      "nsqd ", kVersion, ", an NSQ message queue daemon compatible with nsqd ", kProtocolVersion,
      "\n\nUsage: nsqd [--flag=value ...]\n\nA flag may have one dash or two. Its value may follow as the next word, "
      "unless it is true or false.\nDurations are numbers with units (1h30m, 250ms). Flags with (*) may be repeated.\n"
      "A config file has the same settings, with _ for -.\n\nFlags:\n");
  for (const Flag& flag : flags()) {
    std::string value = show_option(Options(), flag.key()).value_or(ShownOption()).value;
    if (flag.sets<Duration>()) value = duration_text(decimal(value).value_or(0));
    const bool told = value.empty() || value == "[]" || flag.help.find("default") != flag.help.npos;
    out += text("  --", flag.name, "\n        ", flag.help, told ? "" : text(" (default ", value, ")"), "\n");
  }
  return out;
}

/// The name of the flag that begins most like a word.
inline std::string_view nearest_flag(std::string_view word) {
  auto common = [word](auto name) { return std::mismatch(word.begin(), word.end(), name.begin(), name.end()).first; };
  const auto less = [common](const Flag& a, const Flag& b) { return common(a.name) < common(b.name); };
  return std::max_element(std::begin(flags()), std::end(flags()), less)->name;
}

/// A remark on the options, before there is a logger.
inline void remark(const std::string& what) {
  std::fprintf(stderr, "%s\n", Logger::line("[nsqd] ", Level::kWarning, what).c_str());
}

/// What the flags say, read as Go's flag package does: up to the first word that is none.
inline Given read_flags(int argc, const char* const* argv) {
  auto refuse = [](const auto&... why) { throw EarlyExit(2, text(why..., "\nnsqd --help lists all flags")); };
  Given given;
  for (int i = 1; i < argc; ++i) {
    const std::string_view word = argv[i];
    if (word == "--") break;
    if (word.size() < 2 || word[0] != '-') {
      remark(text("no flag is read from ", quoted(word), " on (a flag that is true or false takes its value with =)"));
      break;
    }
    std::string_view value = word.substr(word[1] == '-' ? 2 : 1);
    const std::string_view name = take_front(value, value.find('='));
    if (name.empty() || name[0] == '-') refuse("bad flag syntax: ", word);
    if (name == "help" || name == "h") throw EarlyExit(0, usage(), true);
    const Flag* flag = find_flag(name);
    if (flag == nullptr) refuse("flag provided but not defined: -", name, "\ndid you mean --", nearest_flag(name), "?");
    if (!value.empty()) value.remove_prefix(1);
    else if (flag->is_bool()) value = "true";
    else if (++i < argc) value = argv[i];
    else refuse("flag needs an argument: -", name);
    const bool good = set_option(given, *flag, value);
    if (!good && flag->is_bool()) refuse("invalid boolean value \"", value, "\" for -", name, ": parse error");
    const std::string_view hint = flag->sets<Duration>() ? "\na duration has units: 1m30s, 250ms" : "";
    if (!good) refuse("invalid value \"", value, "\" for flag -", name, ": parse error", hint);
    given.flags.insert(flag->name);
  }
  auto& percentiles = given.e2e_processing_latency_percentile;
  std::sort(percentiles.begin(), percentiles.end(), std::greater<>());
  return given;
}

// ---- The config file ------------------------------------------------------------------------------------------------

/// Sets an option by nsqd's rules for its file: a text may be a list or a decimal integer, an integer is a duration in
/// milliseconds and, as a truth value, the opposite of what one would think. Returns whether it could.
inline bool set_from_file(Given& given, const Flag& flag, const Json& value) {
  const bool texts = flag.sets<Texts>(), is_text = value.is(Json::Type::kString);
  auto set = [&](std::string_view word) { return set_option(given, flag, word); };
  if (value.is(Json::Type::kArray)) {
    const auto type = texts ? Json::Type::kString : Json::Type::kNumber;
    auto set_item = [&](const Json& item) { return item.is(type) && set(item.string); };
    return (texts || flag.sets<Numbers>()) && std::all_of(value.items.begin(), value.items.end(), set_item);
  }
  if ((texts || flag.sets<std::string>()) && !is_text) return false;
  int64_t number = 0;
  const bool is_integer = parse_word(value.string, number);
  if (flag.sets<int64_t>() && is_integer && is_text && !decimal(value.string, true)) return false;
  if (flag.sets<Duration>() && is_integer && !is_text) return set(text(number, "ms"));
  if (flag.is_bool() && is_integer && !is_text) return set(number == 0 ? "true" : "false");
  const Texts parts = texts ? split_at_commas(value.string) : Texts{value.string};
  return std::all_of(parts.begin(), parts.end(), set);
}

/// Words or texts in quotes, with dots between, and the sign after them.
inline std::string parse_key(JsonParser& file, char sign) {
  std::string key;
  do {
    file.skip_space();
    key += key.empty() ? "" : ".";
    key += file.at_quote() ? file.parse_string() : std::string(file.take_word(" \t\r\n.=]'\"#"));
  } while (file.take('.'));
  if (key.empty() || !file.take(sign)) file.fail(text("expected a key and '", std::string(1, sign), "'"));
  return key;
}

/// Sets what the config file says and the flags did not. Its first table ends it: nsqd has no settings in tables.
inline void apply_file(Given& given) {
  const auto content = read_file(given.config);
  if (!content) throw std::runtime_error(text("failed to load config file ", given.config, " - no such file"));
  JsonParser file(*content, true);
  std::set<std::string> seen;
  std::string key;
  while (file.error.empty()) {
    if (file.take('\n')) continue;
    if (file.at_end() || file.next() == '[') break;
    key = parse_key(file, '=');
    const Json value = file.parse_value();
    const Flag* flag = find_flag(key, true);
    if (file.error.empty() && flag == nullptr) remark(text(given.config, ": there is no setting ", quoted(key)));
    const bool wanted = file.error.empty() && flag != nullptr && given.flags.count(flag->name) == 0;
    if (wanted && !set_from_file(given, *flag, value)) file.fail(text("wrong value (", flag->help, ")"));
    if (!seen.insert(key).second) file.fail("given twice");
    if (!file.take('\n') && !file.at_end()) file.fail("expected the end of the line");
  }
  if (file.take('[') && (file.take('['), true)) key = parse_key(file, ']');
  if (file.error.empty()) return;
  throw std::runtime_error(text("failed to load config file ", given.config, " - ", key, ": ", file.error));
}

/// Fills in what depends on the host, and throws where a daemon cannot start with these options.
inline void complete_options(Options& o) {
  const std::string host = host_name();
  if (o.node_id == Options::kFromHostName) o.node_id = checksum(0, host.data(), host.size()) % 1024;
  if (o.broadcast_address.empty()) o.broadcast_address = host;
  const bool tls = !text(o.tls_cert, o.tls_key, o.tls_root_ca_file, o.tls_client_auth_policy).empty();
  const std::string& method = o.auth_http_request_method;
  const auto& shares = o.e2e_processing_latency_percentile;
  auto is_share = [](double share) { return share > 0 && share <= 1; };
  auto within = [](int64_t value, int64_t least, int64_t most) { return value >= least && value <= most; };
  constexpr Duration kZero{};
  const std::pair<bool, const char*> rules[] = {
      {!tls && o.tls_required == 0, "there is no TLS in this daemon: leave out all --tls- flags but --tls-min-version, "
                                    "or put a proxy that ends TLS before it"},
      {within(o.max_deflate_level, 1, 9), "--max-deflate-level must be [1,9]"},
      {within(o.node_id, 0, 1023), "--node-id must be [0,1024)"},
      {method == "get" || method == "post", "--auth-http-request-method must be post or get"},
      {std::all_of(shares.begin(), shares.end(), is_share), "invalid E2E processing latency percentile: not in (0,1]"},
      {within(o.max_msg_size, 1, kLargestSegment / 2), "--max-msg-size must be [1,536870912]"},
      {within(o.max_body_size, 1, INT32_MAX), "--max-body-size must be [1,2147483647]"},
      {o.mem_queue_size >= 0, "--mem-queue-size must not be negative"},
      {o.max_bytes_per_file > 0, "--max-bytes-per-file must be above 0"},
      {o.queue_scan_selection_count > 0, "--queue-scan-selection-count must be above 0"},
      {o.sync_timeout >= kZero, "--sync-timeout must not be negative"},
      {o.max_req_timeout >= kZero, "--max-req-timeout must not be negative"},
      {o.output_buffer_timeout > kZero, "--output-buffer-timeout must be above 0"},
      {o.e2e_processing_latency_window_time > kZero, "--e2e-processing-latency-window-time must be above 0"},
      {std::min(o.msg_timeout, o.max_msg_timeout) > kZero, "--msg-timeout and --max-msg-timeout must be above 0"},
      {o.statsd_interval > std::chrono::seconds(1), "--statsd-interval must be above 1s"},
  };
  for (const auto& [holds, why] : rules)
    if (!holds) throw std::runtime_error(text("failed to instantiate nsqd - ", why));
}

}  // namespace nsqd::detail

namespace nsqd {

inline Options options_from(int argc, const char* const* argv) {
  detail::Given given = detail::read_flags(argc, argv);
  if (given.version) throw EarlyExit(0, detail::build_text(), true);
  if (!given.config.empty()) detail::apply_file(given);
  return given;
}

// ---------------------------------------------------------------------------------------------------------------------
// [17] Run
//
// How a program starts and stops: init, start, wait, stop. The only part that knows signals.
// Always: a signal that comes after run() has begun is seen exactly once, whatever the service is doing then.
// ---------------------------------------------------------------------------------------------------------------------

inline int run(Service& service, int argc, const char* const* argv, std::initializer_list<int> signals) {
  const int end_signal = signals.size() > 0 ? *signals.begin() : SIGTERM;  // where there is only Environment::end
  sigset_t awaited;
  ::sigemptyset(&awaited);
  for (int number : signals) ::sigaddset(&awaited, number);
  ::sigaddset(&awaited, end_signal);
  sigset_t blocked = awaited;
  ::sigaddset(&blocked, SIGXFSZ);  // a file that may not grow is an error of the write, and no end of the process
  ::pthread_sigmask(SIG_BLOCK, &blocked, nullptr);  // threads that the service starts inherit this
  rlimit descriptors{};  // one for each client: as many as the system lets us have
  if (::getrlimit(RLIMIT_NOFILE, &descriptors) == 0) descriptors.rlim_cur = descriptors.rlim_max;
  if (descriptors.rlim_max > 0) ::setrlimit(RLIMIT_NOFILE, &descriptors);
  try {
    service.init({argc, argv, [self = ::pthread_self(), end_signal] { ::pthread_kill(self, end_signal); }});
    service.start();
  } catch (const EarlyExit& exit) {
    return std::fprintf(exit.to_stdout ? stdout : stderr, "%s\n", exit.what()), exit.status;
  } catch (const std::exception& error) {
    const std::string line = detail::Logger::line("[nsqd] ", Level::kFatal, error.what());
    return std::fprintf(stderr, "%s\n", line.c_str()), 1;
  }
  int caught = 0;
  while (::sigwait(&awaited, &caught) != 0) continue;
  return service.stop();
}

}  // namespace nsqd

// ---------------------------------------------------------------------------------------------------------------------
// [18] Licence
//
// MIT License
//
// Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation
// files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy,
// modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
// Software is furnished to do so, subject to the following conditions:
//
// The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
// Software.
//
// THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
// WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
// COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE,
// ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
// ---------------------------------------------------------------------------------------------------------------------

#endif  // NSQD_HPP
