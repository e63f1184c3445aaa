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
//              Held: in flight, with consumer, deadline and id, found by InFlight::find --> Port --> Loop::write
//                 |                  |                       |                       |
//                FIN          REQ 0, Channel::expire       REQ t                   TOUCH
//           States::set          Channel::put_back     Channel::put_off        a later deadline
//                 |
//                 v
//        Topic::release_if_done: a segment that every channel has finished goes
//
// Words: a topic's *log* holds its messages, in *segments*; each message has a *number* there. A channel's *cursor* is the
// number of the first message that it never delivered. A message is *waiting*, *in flight*, *requeued* (ready again),
// *deferred* (due at a time) or *finished*. Messages below a topic's *distributed* mark were handed to its channels. A
// segment is *sealed* when it gets no more messages, *warm* while it is mapped for use. A *session* is one side of a
// connection, a *turn* one round of the loop.
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
/// wrong or that only ask for a text, std::runtime_error for a config file that is wrong.
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
  /// std::invalid_argument for a bad name, size or delay, std::runtime_error when it cannot store or was stopped.
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
// Tools of a few lines each: results, descriptors, byte order, names, clocks, timers, message ids, checksums.
// ---------------------------------------------------------------------------------------------------------------------

namespace nsqd::detail {

inline constexpr int64_t kMicrosecond = 1000, kMillisecond = 1000 * kMicrosecond, kSecond = 1000 * kMillisecond;
inline constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

/// What can fail on the loop returns a Status; only the start throws.
struct [[nodiscard]] Status {
  std::string error;  // empty: it worked
  bool ok() const { return error.empty(); }
};

/// The parts one after the other: texts as they are, numbers in decimal.
template <typename... Parts>
std::string text(const Parts&... parts) {
  std::string joined;
  auto add = [&joined](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) joined += std::to_string(part);
    else joined += part;
  };
  (add(parts), ...);
  return joined;
}

/// The one place where errno becomes a text.
inline Status system_error(std::string_view action, std::string_view path, int code = errno) {
  return {text(action, " ", path, ": ", std::strerror(code))};
}

inline Duration to_duration(int64_t nanoseconds) { return Duration(nanoseconds); }

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
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd() { close(); }
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }

 private:
  int fd_;
};

// Numbers in memory: host byte order for our own files, big endian for the wire. memcpy keeps this free of alignment
// and aliasing rules and compiles to a single instruction.
template <typename Number>
Number load(const char* from) {
  Number number;
  std::memcpy(&number, from, sizeof number);
  return number;
}
template <typename Number>
void store(char* to, Number number) {
  std::memcpy(to, &number, sizeof number);
}
template <typename Number>
Number get_be(const char* from) {
  Number number = 0;
  for (size_t i = 0; i < sizeof number; ++i) number = static_cast<Number>((number << 8) | static_cast<uint8_t>(from[i]));
  return number;
}
template <typename Number>
void put_be(char* to, Number number) {
  for (size_t i = sizeof number; i-- > 0; number = static_cast<Number>(number >> 8)) to[i] = static_cast<char>(number & 0xFF);
}

inline bool ends_with(std::string_view whole, std::string_view end) {
  return whole.size() >= end.size() && whole.substr(whole.size() - end.size()) == end;
}

inline constexpr std::string_view kDigits = "0123456789", kEphemeral = "#ephemeral";
inline bool is_ephemeral(std::string_view name) { return ends_with(name, kEphemeral); }

/// Topic and channel names: 1 to 64 of . _ - and ASCII letters and digits, the suffix #ephemeral counted but not alone.
inline bool valid_name(std::string_view name) {
  if (name.size() > 64) return false;
  if (is_ephemeral(name)) name.remove_suffix(kEphemeral.size());
  auto allowed = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-';
  };
  return !name.empty() && std::all_of(name.begin(), name.end(), allowed);
}

inline char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }
inline std::string lower(std::string_view word) {
  std::string lowered(word);
  for (char& c : lowered) c = lower(c);
  return lowered;
}
inline bool same_word(std::string_view a, std::string_view b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](char x, char y) { return lower(x) == lower(y); });
}
inline std::string_view trimmed(std::string_view word) {
  const size_t first = word.find_first_not_of(" \t\r");
  return first == word.npos ? std::string_view() : word.substr(first, word.find_last_not_of(" \t\r") - first + 1);
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
inline int64_t hex_digit(char c) {
  const size_t value = std::string_view("0123456789abcdef").find(lower(c));
  return value == std::string_view::npos ? 16 : static_cast<int64_t>(value);
}

/// A whole number: digits only, unless a sign is allowed. Nothing for anything else, overflow included.
inline std::optional<int64_t> decimal(std::string_view digits, bool sign_allowed = false, int64_t base = 10) {
  const int64_t sign = sign_allowed && take_sign(digits) ? -1 : 1;
  if (digits.empty()) return std::nullopt;
  int64_t number = 0;
  for (char c : digits) {
    const int64_t digit = hex_digit(c);
    const bool overflow = __builtin_mul_overflow(number, base, &number) || __builtin_add_overflow(number, sign * digit, &number);
    if (digit >= base || overflow) return std::nullopt;
  }
  return number;
}

/// The time of a turn: monotonic for deadlines, wall clock for what is stored or shown. Both in nanoseconds.
struct Now {
  int64_t steady = 0;
  int64_t wall = 0;
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
  for (size_t most = queue.size(); most > 0 && next() <= now; --most) {  // one that sets itself in the past waits for the next turn
    Timer* timer = queue.begin()->second;
    timer->set(kNever);
    const auto fire = timer->fire_;  // a copy: the timer may be destroyed by what it fires
    fire();
  }
}

/// A message's id: 16 characters, opaque to everyone but IdSource.
struct MessageId {
  std::array<char, 16> text;
  bool operator==(const MessageId& other) const { return std::memcmp(text.data(), other.text.data(), 16) == 0; }
  static MessageId from(const char* characters) {
    MessageId id;
    std::memcpy(id.text.data(), characters, 16);
    return id;
  }
  uint64_t hash() const {  // ids differ in their last characters, which are the highest bits here: fold them down first
    uint64_t mixed = load<uint64_t>(text.data()) ^ (load<uint64_t>(text.data() + 8) * 0x9E3779B97F4A7C15u);
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
    const uint64_t step = static_cast<uint64_t>((wall >> 20) - kTwepoch);
    if (step > step_ || ++sequence_ == 4096) {
      step_ = std::max(step, step_ + 1);
      sequence_ = 0;
      write(step_ << 22 | node_, 0);
    }
    write(sequence_, 13);  // the last three digits, and nearly always all that changes
    return id_;
  }
  /// Never make an id below this one again: it was found in the log at the start.
  void skip_past(const MessageId& id) {
    const auto number = static_cast<uint64_t>(decimal({id.text.data(), 16}, false, 16).value_or(0));  // 0: not one of ours
    if ((number & 0x3FF000) == node_) step_ = std::max(step_, (number >> 22) + 1);
  }

 private:
  void write(uint64_t number, size_t first_digit) {
    for (size_t i = 16; i-- > first_digit; number >>= 4) id_.text[i] = "0123456789abcdef"[number & 15];
  }
  MessageId id_{};
  uint64_t node_;
  uint64_t step_ = 0;
  uint64_t sequence_ = 0;
};

/// Tells a damaged or foreign record from a whole one. Four lanes of multiply and rotate, 32 bytes a round: each step is a
/// bijection of the word it takes in, so a change within any one word is always noticed before the last fold to 32 bits.
inline uint32_t checksum(uint64_t seed, const char* data, size_t size) {
  constexpr uint64_t kOdd = 0x9E3779B97F4A7C15u;
  auto stir = [](uint64_t lane, uint64_t word) {
    lane = (lane ^ word) * kOdd;
    return lane << 29 | lane >> 35;
  };
  uint64_t a = seed ^ (size * kOdd), b = seed + 1, c = ~seed, d = seed * kOdd;
  for (; size >= 32; data += 32, size -= 32) {
    a = stir(a, load<uint64_t>(data));
    b = stir(b, load<uint64_t>(data + 8));
    c = stir(c, load<uint64_t>(data + 16));
    d = stir(d, load<uint64_t>(data + 24));
  }
  std::array<char, 32> rest{};
  if (size > 0) std::memcpy(rest.data(), data, size);
  a = stir(a, load<uint64_t>(&rest[0]));
  b = stir(b, load<uint64_t>(&rest[8]));
  c = stir(c, load<uint64_t>(&rest[16]));
  d = stir(d, load<uint64_t>(&rest[24]));
  const uint64_t folded = stir(stir(a, b), stir(c, d));
  return static_cast<uint32_t>(folded ^ (folded >> 32));
}

inline std::string host_name() {
  std::array<char, 256> name{};
  return ::gethostname(name.data(), name.size() - 1) == 0 ? std::string(name.data()) : std::string("localhost");
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
    ::clock_gettime(CLOCK_REALTIME, &now);
    tm local{};
    ::localtime_r(&now.tv_sec, &local);
    std::array<char, 48> stamp{};
    std::strftime(stamp.data(), stamp.size(), "%Y/%m/%d %H:%M:%S", &local);
    const std::string fraction = std::to_string(1000000 + now.tv_nsec / 1000).replace(0, 1, ".");
    return text(prefix, stamp.data(), fraction, " ", kNames[static_cast<size_t>(level)], ": ", message);
  }

 private:
  void write(std::string entry) const {
    std::replace_if(entry.begin(), entry.end(), [](char c) { return c == '\n' || c == '\r'; }, ' ');  // whatever a client calls itself
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
// One value type with a strict parser, and a writer. Every JSON text in the daemon goes through them. Both follow what Go's
// encoding/json does, since that is what nsqd's clients and tools were tested with.
// ---------------------------------------------------------------------------------------------------------------------

/// A parsed value. Numbers keep their text, so that 1.0 and 1e3 can be told from integers.
struct Json {
  enum class Type { kNull, kBool, kNumber, kString, kArray, kObject };
  Type type = Type::kNull;
  bool boolean = false;
  std::string string;             // of a string, unescaped; of a number, its text
  std::vector<std::string> keys;  // of an object, in step with items
  std::vector<Json> items;

  bool is(Type wanted) const { return type == wanted; }
  /// The member of that name, the last one of several; null where there is none. As in Go, an exact match is not needed.
  const Json* find(std::string_view key) const {
    for (size_t i = keys.size(); i-- > 0;)
      if (same_word(keys[i], key)) return &items[i];
    return nullptr;
  }
  std::optional<int64_t> integer() const { return type == Type::kNumber ? decimal(string, true) : std::nullopt; }
};

/// The value of a whole text. `error` is empty, or says what is wrong and where. Nesting is bounded, so that no input can
/// exhaust the stack. What is virtual is what the config file, whose values are read by this parser too, does otherwise.
class JsonParser {
 public:
  explicit JsonParser(std::string_view text) : input_(text) {}
  std::string error;

  Json parse() {
    Json value = parse_value();
    skip_space();
    if (at_ < input_.size()) fail("unexpected text after the value");
    return value;
  }

 protected:
  /// Keeps the first error, and goes to the end of the input, where everything that was begun ends by itself.
  void fail(std::string_view why) {
    const std::string_view before = input_.substr(0, at_);
    const auto line = 1 + std::count(before.begin(), before.end(), '\n');
    if (error.empty()) error = text(why, " at line ", line, ", column ", at_ - before.rfind('\n'));  // npos is -1
    at_ = input_.size();
  }
  char next() const { return at_ < input_.size() ? input_[at_] : '\0'; }
  void skip(std::string_view characters) { at_ = std::min(input_.find_first_not_of(characters, at_), input_.size()); }
  bool take(char c) {
    skip_space();
    if (at_ >= input_.size() || input_[at_] != c) return false;
    ++at_;
    return true;
  }

  Json parse_value() {
    Json value;
    skip_space();
    if (depth_ > 64) fail("nested too deeply");
    else if (next() == '{') parse_members(value, Json::Type::kObject, '}');
    else if (next() == '[') parse_members(value, Json::Type::kArray, ']');
    else if (!parse_scalar(value)) fail(at_ < input_.size() ? "expected a value" : "unexpected end");
    return value;
  }
  void parse_members(Json& value, Json::Type type, char close) {
    value.type = type;
    ++at_;
    ++depth_;
    for (bool more = !take(close); more; more = take_comma(close)) {
      if (type == Json::Type::kObject) value.keys.push_back(parse_name());
      value.items.push_back(parse_value());
    }
    --depth_;
  }
  /// What the parser is at, up to the next sign or space.
  std::string_view bare_word() const { return input_.substr(at_, input_.find_first_of(" \t\r\n,]}#", at_) - at_); }

  /// A string with the escapes of JSON; between single quotes there are none.
  std::string parse_string(bool tabs_allowed = false) {
    const char quote = input_[at_++];
    std::string out;
    while (at_ < input_.size() && next() != quote) {
      const char c = input_[at_];
      if (static_cast<unsigned char>(c) < 0x20 && !(c == '\t' && tabs_allowed)) fail("control character in a string");
      else if (++at_; c == '\\' && quote == '"') parse_escape(out);
      else out += c;
    }
    if (at_ >= input_.size()) fail("unexpected end in a string");
    else ++at_;
    return out;
  }

  virtual void skip_space() { skip(" \t\r\n"); }
  /// The name of a member, and the sign after it.
  virtual std::string parse_name() {
    skip_space();
    if (next() != '"') return fail("expected a name in quotes"), "";
    const std::string name = parse_string();
    if (!take(':')) fail("expected ':'");
    return name;
  }
  /// Whether another member follows in a list that ends with `close`.
  virtual bool take_comma(char close) {
    if (take(',')) return true;
    if (!take(close)) fail(text("expected ',' or '", std::string(1, close), "'"));
    return false;
  }
  /// A value without members. Returns whether there was one.
  virtual bool parse_scalar(Json& value) {
    if (next() == '"') {
      value.type = Json::Type::kString;
      value.string = parse_string();
      return true;
    }
    const std::string_view word = bare_word();
    value.boolean = word == "true";
    value.string = is_number(word) ? word : "";
    if (!value.string.empty()) value.type = Json::Type::kNumber;
    else if (word == "true" || word == "false") value.type = Json::Type::kBool;
    else if (word != "null") return false;
    at_ += word.size();
    return true;
  }

  std::string_view input_;
  size_t at_ = 0;
  int depth_ = 0;

 private:
  static bool is_number(std::string_view word) {
    auto digits = [&word] { return take_front(word, word.find_first_not_of(kDigits)); };
    auto one_of = [&word](std::string_view set) { return !take_front(word, std::min<size_t>(word.find_first_not_of(set), 1)).empty(); };
    one_of("-");
    bool good = one_of("0") || !digits().empty();
    if (good && one_of(".")) good = !digits().empty();
    if (good && one_of("eE")) one_of("+-"), good = !digits().empty();
    return good && word.empty();
  }

  void parse_escape(std::string& out) {
    static constexpr std::string_view kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
    const char c = next();
    ++at_;
    if (const size_t which = kFrom.find(c); which != kFrom.npos) out += kTo[which];
    else if (c == 'u') append_utf8(out, parse_code_point());
    else fail("unknown escape in a string");
  }
  /// As Go does it, halves of a pair that stand alone are read as U+FFFD.
  uint32_t parse_code_point() {
    const uint32_t code = parse_hex();
    if (code < 0xD800 || code >= 0xE000) return code;
    if (code >= 0xDC00 || input_.substr(at_, 2) != "\\u") return 0xFFFD;
    at_ += 2;
    const uint32_t second = parse_hex();
    return second >= 0xDC00 && second < 0xE000 ? 0x10000 + ((code - 0xD800) << 10) + (second - 0xDC00) : 0xFFFD;
  }
  uint32_t parse_hex() {
    const std::string_view digits = input_.substr(at_, 4);
    const auto code = digits.size() == 4 ? decimal(digits, false, 16) : std::nullopt;
    if (!code) fail("expected four hex digits");
    else at_ += 4;
    return static_cast<uint32_t>(code.value_or(0));
  }
  static void append_utf8(std::string& out, uint32_t code) {
    static constexpr std::array<uint32_t, 4> kLead = {0, 0xC0, 0xE0, 0xF0};
    const uint32_t more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    out += static_cast<char>(kLead[more] | code >> (6 * more));
    for (uint32_t i = more; i-- > 0;) out += static_cast<char>(0x80 | (code >> (6 * i) & 0x3F));
  }
};

/// The length of the UTF-8 character at the front of `s`, or 0 where its bytes are not UTF-8 (RFC 3629).
inline size_t utf8_length(std::string_view s) {
  auto byte = [&s](size_t i) { return static_cast<uint8_t>(s[i]); };
  const uint8_t first = byte(0);
  const size_t size = first < 0x80 ? 1 : first < 0xC2 ? 0 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : first < 0xF5 ? 4 : 0;
  if (size < 2 || s.size() < size) return size == 1 ? 1 : 0;
  for (size_t i = 2; i < size; ++i)
    if ((byte(i) & 0xC0) != 0x80) return 0;
  const uint8_t least = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;  // nothing in more bytes than it needs
  const uint8_t most = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;   // no halves of pairs, nothing above U+10FFFF
  return byte(1) >= least && byte(1) <= most ? size : 0;
}

/// `c` as `\x1f`, `\u001f` and the like: a prefix and lower-case hex digits.
inline std::string hex_escape(std::string_view prefix, uint32_t c, int digits) {
  std::string escaped(prefix);
  for (int i = digits - 1; i >= 0; --i) escaped += "0123456789abcdef"[c >> (4 * i) & 15];
  return escaped;
}

/// Writes JSON with nsqd's order of keys (that of the calls) and no spaces.
class JsonWriter {
 public:
  std::string out;

  JsonWriter& raw(std::string_view json) { return append(comma(), false).append(json, false); }
  JsonWriter& open(char bracket) { return append(comma(), false).append({&bracket, 1}, true); }
  JsonWriter& close(char bracket) { return append({&bracket, 1}, false); }
  JsonWriter& key(std::string_view name) { return raw(quoted(name)).append(":", true); }

  /// A truth value, a number, a text, or a list of these.
  template <typename Value>
  JsonWriter& value(const Value& v) {
    if constexpr (std::is_same_v<Value, bool>) return raw(v ? "true" : "false");
    else if constexpr (std::is_integral_v<Value>) return raw(std::to_string(v));
    else if constexpr (std::is_floating_point_v<Value>) return raw(shortest(v));
    else if constexpr (std::is_convertible_v<const Value&, std::string_view>) return raw(quoted(v));
    else {
      open('[');
      for (const auto& item : v) value(item);
      return close(']');
    }
  }
  template <typename Value>
  JsonWriter& member(std::string_view name, const Value& v) {
    return key(name).value(v);
  }

 private:
  std::string_view comma() const { return fresh_ ? "" : ","; }
  JsonWriter& append(std::string_view piece, bool fresh) {
    out += piece;
    fresh_ = fresh;
    return *this;
  }

  static std::string shortest(double number) {  // that reads back the same
    std::array<char, 40> digits{};
    for (int precision = 1; precision <= 17; ++precision) {
      std::snprintf(digits.data(), digits.size(), "%.*g", precision, number);
      if (std::strtod(digits.data(), nullptr) == number) break;
    }
    return digits.data();
  }
  static std::string quoted(std::string_view s) {
    std::string quoted = "\"";
    while (!s.empty()) {
      const size_t size = utf8_length(s);
      quoted += size == 0 ? "\\ufffd" : escaped(s.substr(0, size));
      s.remove_prefix(std::max<size_t>(size, 1));
    }
    return quoted + '"';
  }
  static std::string escaped(std::string_view character) {
    static constexpr std::string_view kPlain = "\"\\\n\r\t", kLetter = "\"\\nrt";
    const char c = character[0];
    if (const size_t which = kPlain.find(c); which != kPlain.npos) return {'\\', kLetter[which]};
    if (static_cast<unsigned char>(c) < 0x20 || c == '<' || c == '>' || c == '&') return hex_escape("\\u", static_cast<uint8_t>(c), 4);
    if (character == "\xE2\x80\xA8") return "\\u2028";
    return character == "\xE2\x80\xA9" ? "\\u2029" : std::string(character);
  }

  bool fresh_ = true;  // no comma before what comes next
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
    auto refuse = [](const std::string& why) { throw std::runtime_error("failed to instantiate nsqd - failed to lock data-path: " + why); };
    if (!fd_) refuse(text("open ", path, ": ", lower(std::strerror(errno)), " (--data-path must name a directory that exists)"));
    if (::flock(fd_.get(), LOCK_EX | LOCK_NB) != 0)
      refuse(text("cannot flock directory ", path, " - resource temporarily unavailable (possibly in use by another instance of nsqd)"));
  }

 private:
  Fd fd_;
};

inline Status sync_path(const std::string& path) {
  const Fd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) return errno == ENOENT ? Status{} : system_error("open", path);  // gone since: nothing left to sync
  return ::fsync(file.get()) == 0 ? Status{} : system_error("fsync", path);
}

inline Status write_whole(int fd, std::string_view content, const std::string& path) {
  while (!content.empty()) {
    const ssize_t written = ::write(fd, content.data(), content.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return system_error("write", path);
    content.remove_prefix(static_cast<size_t>(written));
  }
  return {};
}

/// Replaces a file so that it is whole at any moment: write aside, fsync, rename, fsync the directory.
inline Status replace_file(const std::string& directory, const std::string& name, std::string_view content) {
  const std::string path = directory + "/" + name, aside = path + ".tmp";
  Fd file(::open(aside.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  if (!file) return system_error("open", aside);
  Status status = write_whole(file.get(), content, aside);
  if (status.ok() && ::fsync(file.get()) != 0) status = system_error("fsync", aside);
  if (status.ok() && ::rename(aside.c_str(), path.c_str()) != 0) status = system_error("rename to", path);
  if (!status.ok()) {
    ::unlink(aside.c_str());
    return status;
  }
  return sync_path(directory);
}

/// The content of a file; nothing where there is none. Throws for any other reason not to read it.
inline std::optional<std::string> read_file(const std::string& path) {
  const Fd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file && errno == ENOENT) return std::nullopt;
  std::string content;
  std::array<char, 65536> buffer;
  ssize_t got = file ? 0 : -1;
  while (file && (got = ::read(file.get(), buffer.data(), buffer.size())) != 0) {
    if (got > 0) content.append(buffer.data(), static_cast<size_t>(got));
    else if (errno != EINTR) break;
  }
  if (got < 0) throw std::runtime_error(system_error("read", path).error);
  return content;
}

/// What nsqd.dat holds.
struct Metadata {
  struct Entry {
    std::string name;
    bool paused = false;
    std::vector<Entry> channels = {};  // of a topic
  };
  using Topic = Entry;
  using Channel = Entry;
  std::vector<Topic> topics = {};

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
    if (why.empty()) metadata.topics = read(root, "topics", why);
    if (!why.empty()) throw std::runtime_error(text("failed to parse metadata in ", path, " - ", why, "; mend the file or move it away"));
    return metadata;
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

  static std::vector<Entry> read(const Json& parent, std::string_view key, std::string& why) {
    std::vector<Entry> entries;
    for (const Json& item : member(parent, key, Json::Type::kArray, why).items) {
      if (!item.is(Json::Type::kObject)) why = text("an item of ", key, " is not an object");
      entries.push_back({member(item, "name", Json::Type::kString, why).string, member(item, "paused", Json::Type::kBool, why).boolean});
      if (key == "topics") entries.back().channels = read(item, "channels", why);
    }
    return entries;
  }
  static const Json& member(const Json& parent, std::string_view key, Json::Type type, std::string& why) {
    static const Json kNull;
    const Json* found = parent.find(key);
    if (found == nullptr || found->is(Json::Type::kNull)) return kNull;
    if (!found->is(type)) why = text("the value of ", key, " is of the wrong type");
    return *found;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// [6] The log
//
// A topic's messages, each stored once, in segments: mapped files, or anonymous memory for what may be forgotten. Beside
// them, per channel and segment, what that channel has done with each message, and the due times of what it put off.
// Always: a record below a segment's count is whole and never changes; numbers rise by one from record to record; what was
// stored survives the end of the process at any instruction, since it lies in the kernel's page cache.
// ---------------------------------------------------------------------------------------------------------------------

inline constexpr size_t kFirstSegment = size_t{1} << 14;   // bytes; so that ten thousand small topics fit anywhere
inline constexpr size_t kWarmSegment = size_t{1} << 23;    // largest one that is kept for reuse when it has been emptied
inline constexpr size_t kFewSegments = 4;                  // more of them are a backlog, for which larger ones are made
inline constexpr size_t kLargestSegment = size_t{1} << 30; // offsets have 31 bits
inline constexpr size_t kFileHeader = 64;
inline constexpr uint32_t kByteOrder = 0x01020304;
inline constexpr uint32_t kFormatVersion = 1;

/// Where logs are kept, what of them is not on the disk yet, and what is wrong with the disk.
struct Storage {
  std::string directory;  // empty: nothing is kept
  size_t largest_segment = kLargestSegment;
  std::string full;       // why the last segment could not be made; empty when it could
  std::string unsynced;   // why the last sync failed; empty when it did not
  uint64_t epoch = 1;     // rises with each sync: a file is dirty when it was touched in this epoch
  uint64_t operations = 0;            // publishes and finishes since the last sync
  std::vector<std::string> dirty = {};  // files touched in this epoch
  bool new_names = false;             // the directory itself has to be synced, too

  std::string health() const { return !full.empty() ? "NOK - " + full : !unsynced.empty() ? "NOK - " + unsynced : "OK"; }
};

/// A file that is mapped, shared with the kernel's page cache, when it is used; or memory that is nobody's else.
class MappedFile {
 public:
  MappedFile(std::string path, size_t size) : path_(std::move(path)), size_(size) {}
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile() { unmap(); }

  char* data() const { return data_; }
  size_t size() const { return size_; }
  const std::string& path() const { return path_; }
  bool mapped() const { return data_ != nullptr; }
  bool anonymous() const { return path_.empty(); }

  /// Makes it, all zeros. Its space is reserved first: a full disk is an error here, and no SIGBUS later.
  Status create(Storage& storage) {
    if (anonymous()) return map(-1);
    const Fd file(::open(path_.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
    if (!file) return system_error("open", path_);
    Status status = reserve(file.get());
    if (status.ok()) status = map(file.get());
    if (!status.ok()) ::unlink(path_.c_str());
    storage.new_names = true;
    return status;
  }
  /// Maps what create made, unless it is mapped already.
  Status open() {
    if (mapped()) return {};
    const Fd file(::open(path_.c_str(), O_RDWR | O_CLOEXEC));
    return file ? map(file.get()) : system_error("open", path_);
  }
  /// Gives the memory back to the kernel; the content stays in the file. Anonymous memory stays: it has no other place.
  void close() {
    if (!anonymous()) unmap();
  }
  void remove() {
    unmap();
    if (!anonymous()) ::unlink(path_.c_str());
  }
  Status rename(const std::string& path, Storage& storage) {
    if (!anonymous() && ::rename(path_.c_str(), path.c_str()) != 0) return system_error("rename", path_);
    if (!anonymous()) path_ = path;
    epoch_ = 0;
    storage.new_names = true;
    return {};
  }
  /// Makes a file of what was memory.
  Status move_to(const std::string& path, Storage& storage) {
    MappedFile made(path, size_);
    Status status = made.create(storage);
    if (!status.ok()) return status;
    std::memcpy(made.data_, data_, size_);
    path_.swap(made.path_);
    std::swap(data_, made.data_);
    return status;
  }
  /// To be called with each change that a sync has to cover.
  void touch(Storage& storage) {
    if (epoch_ == storage.epoch || anonymous()) return;
    epoch_ = storage.epoch;
    storage.dirty.push_back(path_);
  }

 private:
  Status reserve(int file) const {
    int code = EINTR;
    while (code == EINTR) code = ::posix_fallocate(file, 0, static_cast<off_t>(size_));
    if (code == 0) return {};
    if (code != EINVAL && code != EOPNOTSUPP && code != ENOSYS) return system_error("reserve", path_, code);
    const std::string zeros(size_t{1} << 16, '\0');
    Status status;
    for (size_t done = 0; done < size_ && status.ok(); done += zeros.size())
      status = write_whole(file, std::string_view(zeros).substr(0, std::min(zeros.size(), size_ - done)), path_);
    return status;
  }
  Status map(int file) {
    const int flags = file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    void* memory = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, flags, file, 0);
    if (memory == MAP_FAILED) return system_error("map", anonymous() ? "memory" : path_);
    data_ = static_cast<char*>(memory);
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

/// The first bytes of segment and state files, in host byte order:
///
///    0  8  magic "nsqd-seg" or "nsqd-sta"         24  8  number of the first message, as in the file's name
///    8  4  0x01020304, to tell the byte order     32  8  size of the file
///   12  4  version of the format, 1               40  8  capacity in messages
///   16  8  0                                      48  4  checksum of bytes 0 to 47
///
/// It is written after the rest of the file was made, so a header of zeros is that of a file whose making was cut short.
/// Whoever changes the format raises the version; a daemon refuses files of a later version than its own.
struct FileHeader {
  enum class Verdict { kGood, kUnfinished, kDamaged };

  static void write(const MappedFile& file, std::string_view magic, uint64_t first, uint64_t capacity) {
    std::array<char, 52> header{};
    std::memcpy(header.data(), magic.data(), 8);
    store(&header[8], kByteOrder);
    store(&header[12], kFormatVersion);
    store(&header[24], first);
    store(&header[32], static_cast<uint64_t>(file.size()));
    store(&header[40], capacity);
    store(&header[48], checksum(0, header.data(), 48));
    std::atomic_thread_fence(std::memory_order_release);
    std::memcpy(file.data(), header.data(), header.size());
  }

  /// Throws for a file that this daemon must not touch: of another machine or a later version, or cut short.
  static Verdict check(const MappedFile& file, std::string_view magic, uint64_t first, uint64_t capacity) {
    const char* header = file.data();
    if (std::all_of(header, header + 52, [](char c) { return c == 0; })) return Verdict::kUnfinished;
    const bool intact = load<uint32_t>(header + 48) == checksum(0, header, 48) && std::memcmp(header, magic.data(), 8) == 0;
    if (!intact) return Verdict::kDamaged;
    auto refuse = [&file](std::string_view why) { throw std::runtime_error(text(file.path(), " ", why)); };
    if (load<uint32_t>(header + 8) != kByteOrder) refuse("was written on a machine of another byte order; read it there");
    if (load<uint32_t>(header + 12) > kFormatVersion) refuse("was written by a later version of this program; use that one, or move the file away");
    if (load<uint64_t>(header + 32) > file.size()) refuse("is shorter than it was made; restore it from a copy, or move it away");
    return load<uint64_t>(header + 24) == first && load<uint64_t>(header + 40) == capacity ? Verdict::kGood : Verdict::kDamaged;
  }
};

/// Consecutive messages of one topic, in the form in which they go out: whole frames with attempts = 1.
///
///    header   0 .. 51   see FileHeader
///            52  4      0
///            56  8      tally: count of records, then its complement; stored last
///    mark    64  8      how many of them were handed to the channels, then the complement; kFollows: all
///    frames  72 ..      one after the other: [ due 8, deferred ones only ] size 4, type 4, timestamp 8, attempts 2, id 16, body
///    slots   .. end     8 bytes each, the first one last: offset of the frame (top bit: deferred) 4, checksum 4
///
/// Frames grow from the front and slots from the back, so both have room whatever the size of the messages. The checksum
/// covers due and frame, and starts from the record's number: what an earlier use of the file left behind is never taken
/// for a record. tally and mark are one aligned word each, so a killed process leaves the old or the new one.
/// Always: count <= capacity; frames end at or before the slots begin; `sealed` segments get no further record.
class Segment {
 public:
  static constexpr size_t kFrames = 72;
  static constexpr size_t kFrameHead = 8 + 26;  // size, type, and a message without its body
  static constexpr uint32_t kFollows = 0xFFFFFFFF;
  static constexpr uint32_t kDeferred = 0x80000000;
  static constexpr std::string_view kMagic = "nsqd-seg";

  Segment(std::string path, size_t size, uint64_t first_number) : file(std::move(path), size), first(first_number) {}

  MappedFile file;
  uint64_t first;                  // number of its first message
  uint32_t count = 0;              // records that are part of it
  uint32_t deferred_records = 0;   // how many of them were published with a delay
  bool sealed = false;
  int pins = 0;                    // keep it for a moment more
  int cursors = 0;                 // that are in it
  std::vector<uint32_t> damaged = {};  // records that recovery found broken; no channel ever gets them

  /// 64 bytes a message and no more, so that a channel's states take a fraction of the segment that they belong to.
  uint32_t capacity() const { return static_cast<uint32_t>(file.size() / 64); }
  uint64_t end() const { return first + count; }
  bool warm() const { return cursors > 0 || !sealed; }
  bool deferred(uint32_t i) const { return deferred_records > 0 && (slot_offset(i) & kDeferred) != 0; }
  const char* frame(uint32_t i) const { return file.data() + (slot_offset(i) & ~kDeferred); }
  static size_t frame_size(const char* frame) { return 4 + size_t{get_be<uint32_t>(frame)}; }
  static MessageId id_of(const char* frame) { return MessageId::from(frame + 18); }
  int64_t due_of(uint32_t i) const { return load<int64_t>(frame(i) - 8); }

  /// Makes an empty segment of a new file or a spare one.
  void begin(uint64_t first_number) {
    first = first_number;
    deferred_records = 0;
    sealed = false;
    damaged.clear();
    end_of_frames_ = kFrames;
    std::memset(file.data(), 0, kFrames);
    set_count(0);
    FileHeader::write(file, kMagic, first, capacity());
  }

  bool has_room(size_t body, bool with_due) const {
    const size_t frames = end_of_frames_ + kFrameHead + body + (with_due ? 8 : 0);
    return !sealed && written_ < capacity() && frames + 8 * (size_t{written_} + 1) <= file.size();
  }
  /// Writes a record, which counts from the next commit() on. Needs has_room.
  void append(const MessageId& id, int64_t timestamp, std::string_view body, int64_t due, uint16_t attempts = 1) {
    char* begin = file.data() + end_of_frames_;
    char* at = begin;
    if (due != 0) {
      store(at, due);
      at += 8;
    }
    const auto offset = static_cast<uint32_t>(at - file.data());
    put_be(at, static_cast<uint32_t>(4 + 26 + body.size()));
    put_be(at + 4, uint32_t{2});
    put_be(at + 8, static_cast<uint64_t>(timestamp));
    put_be(at + 16, attempts);
    std::memcpy(at + 18, id.text.data(), 16);
    std::memcpy(at + kFrameHead, body.data(), body.size());
    at += kFrameHead + body.size();
    store(slot(written_), due != 0 ? offset | kDeferred : offset);
    store(slot(written_) + 4, checksum(first + written_, begin, static_cast<size_t>(at - begin)));
    end_of_frames_ = static_cast<size_t>(at - file.data());
    if (due != 0) ++deferred_records;
    ++written_;
  }
  void commit(Storage& storage) {
    if (written_ == count) return;
    storage.operations += written_ - count;
    set_count(written_);
    file.touch(storage);
  }

  void set_mark(uint32_t handed, Storage& storage) {
    store(file.data() + 64, twofold(handed));
    file.touch(storage);
  }
  uint32_t mark() const {
    const auto word = load<uint64_t>(file.data() + 64);
    return word == twofold(static_cast<uint32_t>(word)) ? static_cast<uint32_t>(word) : 0;
  }

  /// Takes every whole record of a file that an earlier process left. Records that are broken behind the last whole one are
  /// a torn tail, cut off where `is_tail`; others are damage. Throws for a file that must not be touched; returns false for
  /// one that holds nothing and can go.
  bool recover(bool is_tail, const Logger& logger) {
    const auto verdict = FileHeader::check(file, kMagic, first, capacity());
    const auto tally = load<uint64_t>(file.data() + 56);
    const bool counted = verdict == FileHeader::Verdict::kGood && tally == twofold(static_cast<uint32_t>(tally));
    uint32_t limit = counted ? std::min(static_cast<uint32_t>(tally), capacity()) : capacity();
    uint32_t whole = 0;  // one more than the last whole record
    for (uint32_t i = 0; i < limit && end_of_frames_ + 8 * (size_t{i} + 1) <= file.size(); ++i) {
      if (!counted && load<uint64_t>(slot(i)) == 0) break;
      if (take(i)) whole = i + 1;
      else damaged.push_back(i);
    }
    if (!counted && whole == 0) {
      const bool blank = load<uint64_t>(slot(0)) == 0 && load<uint64_t>(file.data() + kFrames) == 0;
      if (!blank && verdict == FileHeader::Verdict::kDamaged)
        throw std::runtime_error(text(file.path(), " is no segment, or damaged beyond repair; restore it from a copy, or move it away"));
      return false;
    }
    const uint32_t kept = is_tail || !counted ? whole : limit;
    while (!damaged.empty() && damaged.back() >= kept) damaged.pop_back();
    if (!counted) logger.say(Level::kWarning, "LOG: ", file.path(), " has a damaged header at offset 0; kept ", kept, " messages");
    else if (kept < limit) logger.say(Level::kInfo, "LOG: ", file.path(), " ends in ", limit - kept, " torn messages; kept ", kept);
    for (uint32_t i : damaged)
      logger.say(Level::kError, "LOG: ", file.path(), " message ", first + i, " is damaged at offset ", slot_offset(i) & ~kDeferred, "; left out");
    set_count(kept);
    if (verdict == FileHeader::Verdict::kDamaged) FileHeader::write(file, kMagic, first, capacity());
    sealed = !damaged.empty();  // where its frames end is known for certain only when all of them are whole
    return true;
  }

 private:
  static uint64_t twofold(uint32_t value) { return value | static_cast<uint64_t>(~value) << 32; }
  char* slot(uint32_t i) const { return file.data() + file.size() - 8 * (size_t{i} + 1); }
  uint32_t slot_offset(uint32_t i) const { return load<uint32_t>(slot(i)); }
  void set_count(uint32_t records) {
    std::atomic_thread_fence(std::memory_order_release);
    store(file.data() + 56, twofold(records));
    count = written_ = records;
  }
  /// Whether record i is whole; notes where it ends and whether it is deferred.
  bool take(uint32_t i) {
    const uint32_t offset = slot_offset(i);
    const bool due = (offset & kDeferred) != 0;
    const size_t at = offset & ~kDeferred, begin = due ? at - 8 : at, slots = file.size() - 8 * (size_t{i} + 1);
    if (at < kFrames + (due ? 8 : 0) || at > slots || slots - at <= kFrameHead) return false;
    const size_t size = frame_size(file.data() + at);
    if (size <= kFrameHead || size > slots - at) return false;
    if (load<uint32_t>(slot(i) + 4) != checksum(first + i, file.data() + begin, at - begin + size)) return false;
    end_of_frames_ = at + size;
    if (due) ++deferred_records;
    return true;
  }
  uint32_t written_ = 0;  // records written, committed or not
  size_t end_of_frames_ = kFrames;
};

/// What one channel has done with each message of one segment, 16 bits each behind the header: 0 never delivered, n
/// delivered n times (65534: or more often), 65535 finished. FIN is one store. A channel makes them when it gets to the
/// segment, and removes them when it has finished all of it, but never the latest ones that it has: so to a channel, the
/// segments behind its latest states are all waiting, and those before them that have none are finished.
/// Always: entries at or above the segment's count are 0.
class States {
 public:
  static constexpr uint16_t kFinished = 0xFFFF, kMost = 0xFFFE;
  static constexpr std::string_view kMagic = "nsqd-sta";
  static size_t size_for(const Segment& segment) { return kFileHeader + size_t{segment.capacity()} * 2; }

  States(std::string path, Segment& of) : file(std::move(path), size_for(of)), segment(&of) {}
  States(const States&) = delete;
  States& operator=(const States&) = delete;

  MappedFile file;
  Segment* segment;
  uint32_t finished = 0;
  uint32_t held = 0;  // of its messages that are in flight, requeued or deferred

  uint16_t get(uint32_t i) const { return load<uint16_t>(at(i)); }
  void set(uint32_t i, uint16_t state) { store(at(i), state); }
  /// Marks [begin, end) as finished, whatever they were.
  void finish(uint32_t begin, uint32_t end) {
    for (uint32_t i = begin; i < end; ++i) {
      if (get(i) != kFinished) ++finished;
      set(i, kFinished);
    }
  }

  /// After a restart: damaged messages are finished, what lies above the count is none, and the finished ones are counted.
  void clean_up() {
    for (uint32_t i : segment->damaged) set(i, kFinished);
    finished = 0;
    for (uint32_t i = 0; i < segment->count; ++i)
      if (get(i) == kFinished) ++finished;
    for (uint32_t i = segment->count; i < segment->capacity(); ++i)
      if (get(i) != 0) set(i, 0);
  }

 private:
  char* at(uint32_t i) const { return file.data() + kFileHeader + size_t{i} * 2; }
};

/// When the messages that a channel has put off (REQ with a delay) are due, so that a restart keeps to it: entries of 16
/// bytes, message number + 1 and due time (wall clock, ns), the last one of a message counts, zeros end the list.
class DueBook {
 public:
  explicit DueBook(std::string path) : path_(std::move(path)) {}
  using Entry = std::pair<uint64_t, int64_t>;  // number, due

  /// Adds an entry. When the book is full a new one is begun with `live`, which must include it.
  template <typename Live>
  Status add(const Entry& entry, Storage& storage, Live&& live) {
    if (path_.empty()) return {};
    if (file_ == nullptr || (used_ + 1) * kEntry > file_->size()) {
      Status status = begin_anew(live(), storage);
      if (!status.ok()) return status;
    } else {
      put(entry);
    }
    file_->touch(storage);
    return {};
  }
  void clear() {
    if (file_ != nullptr) std::memset(file_->data(), 0, used_ * kEntry);
    used_ = 0;
  }
  void remove() {
    if (file_ != nullptr) file_->remove();
    file_.reset();
    used_ = 0;
  }
  /// Reads the book of an earlier process.
  std::unordered_map<uint64_t, int64_t> load_entries(size_t file_size) {
    std::unordered_map<uint64_t, int64_t> due;
    file_ = std::make_unique<MappedFile>(path_, file_size / kEntry * kEntry);
    if (file_->size() == 0 || !file_->open().ok()) {
      file_.reset();
      return due;
    }
    for (used_ = 0; (used_ + 1) * kEntry <= file_->size(); ++used_) {
      const auto number = load<uint64_t>(file_->data() + used_ * kEntry);
      if (number == 0) break;
      due[number - 1] = load<int64_t>(file_->data() + used_ * kEntry + 8);
    }
    return due;
  }

 private:
  static constexpr size_t kEntry = 16, kSmallest = 256;  // bytes, entries

  Status begin_anew(const std::vector<Entry>& live, Storage& storage) {
    auto next = std::make_unique<MappedFile>(path_ + ".tmp", std::max(kSmallest, live.size() * 2) * kEntry);
    Status status = next->create(storage);
    if (!status.ok()) return status;
    file_.swap(next);
    used_ = 0;
    for (const Entry& entry : live) put(entry);
    return file_->rename(path_, storage);
  }
  void put(const Entry& entry) {
    char* at = file_->data() + used_++ * kEntry;
    store(at + 8, entry.second);
    std::atomic_thread_fence(std::memory_order_release);
    store(at, entry.first + 1);
  }
  std::string path_;
  std::unique_ptr<MappedFile> file_;
  size_t used_ = 0;
};

/// Segments that were emptied, for all topics to use again: their pages are warm, and to touch fresh pages is the largest
/// cost of a publish.
class Spares {
 public:
  explicit Spares(Storage& storage) : storage_(storage) {}
  /// A spare one with room for so many bytes, or null.
  std::unique_ptr<Segment> take(size_t size, bool anonymous) {
    const auto fits = [&](const auto& s) { return s->file.size() >= size && s->file.anonymous() == anonymous; };
    const auto found = std::find_if(spares_.rbegin(), spares_.rend(), fits);
    if (found == spares_.rend()) return nullptr;
    auto taken = std::move(*found);
    spares_.erase(std::prev(found.base()));
    return taken;
  }
  /// Keeps a segment or removes it.
  void keep(std::unique_ptr<Segment> segment) {
    const size_t size = segment->file.size();
    const bool wanted = spares_.size() < kMost && size <= kWarmSegment && size >= kWarmSegment / 8 && segment->file.mapped();
    if (wanted && segment->file.rename(text(storage_.directory, "/", ++named_, ".spare"), storage_).ok()) spares_.push_back(std::move(segment));
    else segment->file.remove();
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
  /// `prepare` is given each new segment before it counts, `wind_up` each one that was sealed.
  Log(Storage& storage, Spares& spares, std::string topic, bool kept, std::function<void(Segment&)> prepare, std::function<void(Segment&)> wind_up)
      : storage_(storage), spares_(spares), topic_(std::move(topic)), kept_(kept && !storage.directory.empty()), prepare_(std::move(prepare)), wind_up_(std::move(wind_up)) {}

  std::deque<std::unique_ptr<Segment>> segments;

  uint64_t end() const { return end_; }  // number of the next message
  bool kept() const { return kept_; }    // in files
  Segment* tail() const { return segments.empty() || segments.back()->sealed ? nullptr : segments.back().get(); }

  /// The segment of a message, or the next one that there is.
  Segment* at(uint64_t number) const {
    const auto found = std::lower_bound(segments.begin(), segments.end(), number, [](const auto& segment, uint64_t n) { return segment->end() <= n; });
    return found == segments.end() ? nullptr : found->get();
  }

  std::string path(std::string_view channel, uint64_t first, std::string_view kind) const {
    if (!kept_) return {};
    const std::string number = std::to_string(first);
    return text(storage_.directory, "/", topic_, channel.empty() ? "" : ":", channel, ".", std::string(20 - number.size(), '0'), number, kind);
  }

  /// Stores a message, which counts from the next commit on.
  Status append(const MessageId& id, int64_t timestamp, std::string_view body, int64_t due, uint16_t attempts = 1) {
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
  void commit() {
    if (Segment* last = tail()) last->commit(storage_);
  }
  /// Takes a segment that is not needed any more out of the log.
  void release(Segment& segment) {
    const auto found = std::find_if(segments.begin(), segments.end(), [&](const auto& s) { return s.get() == &segment; });
    auto released = std::move(*found);
    segments.erase(found);
    spares_.keep(std::move(released));
  }
  void remove_all() {
    for (auto& segment : segments) segment->file.remove();
    segments.clear();
  }
  void adopt(std::unique_ptr<Segment> segment) {
    end_ = std::max(end_, segment->end());
    segments.push_back(std::move(segment));
  }

 private:
  /// Ends the last segment and begins one that has room for a message of that size.
  Status roll(size_t body) {
    commit();
    const size_t needed = Segment::kFrames + 8 + Segment::kFrameHead + body + 8;
    if (needed > kLargestSegment) return {"the message is too large for a segment"};
    const std::string name = path("", end_, ".segment");
    const size_t wanted = std::max(next_size(), (needed + 4095) / 4096 * 4096);
    std::unique_ptr<Segment> next = wanted <= kWarmSegment ? spares_.take(wanted, !kept_) : nullptr;
    Status status;
    if (next == nullptr) {
      next = std::make_unique<Segment>(name, wanted, end_);
      status = next->file.create(storage_);
      if (!status.ok()) {  // the spare ones hold space, too
        spares_.remove_all();
        status = next->file.create(storage_);
      }
    }
    if (status.ok()) next->begin(end_);
    if (status.ok() && next->file.path() != name) status = next->file.rename(name, storage_);
    storage_.full = status.error;
    if (!status.ok()) {
      next->file.remove();
      return status;
    }
    prepare_(*next);
    Segment* last = tail();
    segments.push_back(std::move(next));
    if (last != nullptr) {
      last->sealed = true;
      wind_up_(*last);
    }
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
  std::function<void(Segment&)> prepare_;
  std::function<void(Segment&)> wind_up_;
  uint64_t end_ = 0;
};

// ---------------------------------------------------------------------------------------------------------------------
// [7] Topics and channels
//
// The queue itself. A topic is a log; a channel is a cursor in it plus the messages that are out of order: in flight,
// requeued, deferred. No sockets and no clock: time is Broker::now, and what goes to a consumer is appended to its Port.
// Always: to a channel, each message of its log below `distributed` is exactly one of: waiting (at or above the cursor,
// state 0, published without a delay), held (in flight, requeued or deferred), or finished.
// ---------------------------------------------------------------------------------------------------------------------

/// Bytes that wait to be written: our own, and runs of frames that lie in a segment and are sent from there.
/// Always: mapped runs live for one turn only; settle() copies what the write of that turn left over.
class Output {
 public:
  size_t size() const { return bytes_.size() - head_ + mapped_; }
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
    if (size < kWorthMapping) return append({data, size});
    runs_.push_back({bytes_.size(), data, size});
    mapped_ += size;
  }
  /// The bytes in order, for writev; at most `most` pieces.
  size_t gather(iovec* pieces, size_t most) const {
    size_t count = 0, at = head_;
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
  /// Takes away the first `done` bytes and copies the mapped runs that remain.
  void settle(size_t done) {
    if (done == size()) return clear();
    if (runs_.empty()) {
      head_ += done;
      if (head_ > bytes_.size() / 2) bytes_.erase(0, std::exchange(head_, 0));
      return;
    }
    std::string left;
    left.reserve(size() - done);
    std::vector<iovec> pieces(2 * runs_.size() + 1);
    pieces.resize(gather(pieces.data(), pieces.size()));
    for (const iovec& piece : pieces) {
      const size_t skip = std::min(done, piece.iov_len);
      done -= skip;
      left.append(static_cast<const char*>(piece.iov_base) + skip, piece.iov_len - skip);
    }
    clear();
    bytes_ = std::move(left);
  }
  void clear() {
    if (bytes_.capacity() > kKeep) bytes_ = {};  // an idle connection holds no memory
    bytes_.clear();
    runs_.clear();
    if (runs_.capacity() > 8) runs_ = {};
    head_ = mapped_ = 0;
  }

 private:
  static constexpr size_t kWorthMapping = 512;  // bytes; a shorter run costs less to copy than to name
  static constexpr size_t kKeep = 1024;
  struct Run {
    size_t at;  // its place: before bytes_[at]
    const char* data;
    size_t size;
  };
  std::string bytes_;
  size_t head_ = 0;  // bytes_ before it are gone already
  std::vector<Run> runs_;
  size_t mapped_ = 0;
};

/// Quantiles of the last while, within 1 % of the exact value (of the sample at that rank): counts in buckets that grow by
/// a factor of 1.01 / 0.99. Two halves of the window, so that what is older than it goes.
class LatencySketch {
 public:
  explicit LatencySketch(int64_t window) : half_window_(std::max<int64_t>(window / 2, 1)) {}
  void add(int64_t nanoseconds, int64_t now) {
    turn(now);
    ++halves_[0][bucket(nanoseconds)];
  }
  /// Merges another one into this one: a topic is its channels merged.
  void merge(LatencySketch& other, int64_t now) {
    other.turn(now);
    for (const auto& half : other.halves_)
      for (const auto& [which, count] : half) halves_[0][which] += count;
  }
  LatencyStats stats(const std::vector<double>& quantiles, int64_t now) {
    if (begun_ != 0) turn(now);
    std::map<int, uint64_t> all = halves_[0];
    for (const auto& [which, count] : halves_[1]) all[which] += count;
    LatencyStats shown;
    for (const auto& [which, count] : all) shown.count += count;
    for (double quantile : quantiles) {
      const auto rank = static_cast<uint64_t>(std::ceil(quantile * static_cast<double>(shown.count)));
      uint64_t below = 0;
      int64_t value = 0;
      for (const auto& [which, count] : all) {
        if (below >= rank) break;
        below += count;
        value = middle(which);
      }
      shown.percentiles.emplace_back(quantile, value);
    }
    return shown;
  }

 private:
  static constexpr double kGrowth = 1.01 / 0.99;
  static int bucket(int64_t nanoseconds) {
    return nanoseconds <= 1 ? 0 : static_cast<int>(std::ceil(std::log(static_cast<double>(nanoseconds)) / std::log(kGrowth)));
  }
  static int64_t middle(int which) { return static_cast<int64_t>(2 * std::pow(kGrowth, which) / (kGrowth + 1)); }
  void turn(int64_t now) {
    if (begun_ == 0) begun_ = now;
    if (now - begun_ < half_window_) return;
    halves_[1] = now - begun_ < 2 * half_window_ ? std::move(halves_[0]) : std::map<int, uint64_t>();
    halves_[0].clear();
    begun_ = now;
  }
  int64_t half_window_;
  int64_t begun_ = 0;  // when the first half began
  std::array<std::map<int, uint64_t>, 2> halves_;
};

struct Consumer;
class Session;
class Topic;
class Channel;

/// What a session writes to. `attend` tells the loop that there is something to do here before the turn ends.
struct Port {
  Output out;
  bool closing = false;           // close when everything is written
  bool dropped = false;           // close at once
  Consumer* consumer = nullptr;   // the subscription, null again when its channel has gone
  Session* session = nullptr;     // whose it is
  std::function<void()> attend = [] {};
};

/// What is known of a client, for the statistics.
struct ClientInfo {
  std::string client_id, hostname, user_agent, address, topology_region, topology_zone;
  bool zone_local = false, region_local = false;
};

/// One subscription of a channel. It outlives its connection for as long as it has messages in flight.
/// Always: in_flight is the number of Held that it owns; it is in its channel's ready list whenever it can take a message.
struct Consumer {
  Consumer(Channel& of, Timers& timers, Port& to, const ClientInfo& who, Duration timeout, int sampling, std::function<void(Consumer&)> expire)
      : channel(of), port(&to), info(&who), msg_timeout(timeout.count()), sample_rate(sampling), timer(timers, [this, expire] { expire(*this); }) {}
  static constexpr size_t kMostOutput = size_t{1} << 20;  // bytes not yet written, above which it gets no more
  static constexpr uint32_t kNone = 0xFFFFFFFF;

  Channel& channel;
  Port* port;              // null when the client is gone
  const ClientInfo* info;  // likewise
  int64_t msg_timeout;     // nanoseconds
  int sample_rate;         // percent; 0: everything
  int64_t rdy = 0, in_flight = 0;
  uint64_t delivered = 0, finished = 0, requeued = 0;
  uint32_t oldest = kNone, newest = kNone;  // its messages in flight, in the order of their deadlines
  bool listed = false;                      // in the channel's ready list
  Timer timer;                              // for the deadline of the oldest

  bool can_take() const { return port != nullptr && in_flight < rdy && port->out.size() < kMostOutput && !port->closing; }
};

/// A message in flight.
struct Held {
  MessageId id;
  States* states;
  uint32_t index;           // in the segment of states
  uint32_t earlier, later;  // neighbours in the owner's list, or the next free one
  Consumer* owner;
  int64_t delivered_at, deadline;
};

/// The messages of one channel that are in flight, found by id: a table of open addressing over a pool.
/// Always: the table is at most half full; `later` of a free entry leads to the next free one.
class InFlight {
 public:
  static constexpr uint32_t kNone = Consumer::kNone;
  size_t size() const { return used_; }
  Held& operator[](uint32_t which) { return pool_[which]; }

  /// Makes room for more, so that insert cannot fail.
  void reserve(size_t more) {
    while ((used_ + more) * 2 > table_.size()) grow();
    if (pool_.capacity() < used_ + more) pool_.reserve(std::max(pool_.capacity() * 2, used_ + more));
  }

  uint32_t find(const MessageId& id) const {
    if (table_.empty()) return kNone;
    for (size_t at = id.hash() & mask();; at = (at + 1) & mask())
      if (table_[at] == kNone || pool_[table_[at]].id == id) return table_[at];
  }

  uint32_t insert(const MessageId& id) {
    if (free_ == kNone) {
      free_ = static_cast<uint32_t>(pool_.size());
      pool_.emplace_back().later = kNone;
    }
    const uint32_t which = std::exchange(free_, pool_[free_].later);
    pool_[which].id = id;
    ++used_;
    place(which);
    return which;
  }

  void erase(uint32_t which) {
    size_t gap = pool_[which].id.hash() & mask();
    while (table_[gap] != which) gap = (gap + 1) & mask();
    for (size_t at = (gap + 1) & mask(); table_[at] != kNone; at = (at + 1) & mask()) {  // close the gap, so that no search ends in it
      const size_t home = pool_[table_[at]].id.hash() & mask();
      if (((at - home) & mask()) < ((at - gap) & mask())) continue;
      table_[gap] = table_[at];
      gap = at;
    }
    table_[gap] = kNone;
    pool_[which].later = std::exchange(free_, which);
    if (--used_ == 0 && pool_.size() > 1024) *this = InFlight();  // an idle channel holds no memory
  }

 private:
  size_t mask() const { return table_.size() - 1; }
  void place(uint32_t which) {
    size_t at = pool_[which].id.hash() & mask();
    while (table_[at] != kNone) at = (at + 1) & mask();
    table_[at] = which;
  }
  void grow() {
    std::vector<uint32_t> larger(std::max<size_t>(16, table_.size() * 2), kNone);
    const auto old = std::exchange(table_, std::move(larger));
    for (uint32_t which : old)
      if (which != kNone) place(which);
  }

  std::vector<Held> pool_;
  std::vector<uint32_t> table_;
  uint32_t free_ = kNone;
  size_t used_ = 0;
};

inline bool topology_aware(const Options& options) {
  const auto& experiments = options.enable_experiment;
  return std::find(experiments.begin(), experiments.end(), "topology-aware-consumption") != experiments.end();
}

/// All topics, and what they share.
class Broker {
 public:
  Broker(const Options& opts, Logger& log, const std::string& directory) : options(opts), logger(log), ids(opts.node_id) {
    storage.directory = directory;
    storage.largest_segment = static_cast<size_t>(std::clamp<int64_t>(opts.max_bytes_per_file, 4096, kLargestSegment)) / 4096 * 4096;
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
  uint64_t metadata_version = 1;    // rises with each topic and channel that comes or goes
  uint64_t metadata_persisted = 0;  // the version that nsqd.dat has
  bool metadata_changed = false;  // nsqd.dat is behind
  bool metadata_awaited = false;  // and somebody waits for it
  /// Told of each topic (channel null) and channel that comes or goes.
  std::function<void(const Topic& topic, const Channel* channel, bool created)> on_change;

  Topic* find(std::string_view name);
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
  Topic(Broker& of, std::string topic_name);

  Broker& broker;
  const std::string name;
  const bool ephemeral;
  Log log;
  std::map<std::string, std::unique_ptr<Channel>, std::less<>> channels;
  uint64_t message_count = 0, message_bytes = 0;
  bool paused = false;
  bool held_back = false;                 // until nsqlookupd has said which channels there are
  bool touched = false, cooling = false;  // in the broker's lists
  std::vector<Channel*> hungry;           // those with a consumer that could take a message when last looked at
  std::vector<Channel*> bounded;          // those in memory only

  uint64_t distributed() const { return distributed_; }
  bool flows() const { return !paused && !held_back && !channels.empty(); }
  int64_t depth() const { return static_cast<int64_t>(log.end() - distributed_); }
  int64_t backend_depth() const;

  /// Stores the bodies, in order; those before the one that fails stay. `delay` in nanoseconds, for all of them.
  Status publish(const std::string_view* bodies, size_t count, int64_t delay);
  Channel* find(std::string_view channel);
  Channel* channel(std::string_view channel, Status& status);  // made where it is missing; null when its files cannot be
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
  void load(std::vector<std::unique_ptr<Segment>> segments);
  void hand_over_imported();
  /// Hands over what was stored and not handed over yet, or stops doing so: to be called when flows() may have changed.
  void update_flow();

 private:
  void prepare(Segment& segment);
  void wind_up(Segment& segment, bool drained);
  void mark_segments();
  void distribute();
  uint64_t distributed_ = 0;
  bool marked_ = true;  // the segments say how far they were handed over; false: they follow
};

/// A message of a channel by its place.
struct Place {
  States* states;
  uint32_t index;
  uint64_t number() const { return states->segment->first + index; }
};

/// See the head of this section for what always holds. `aside` counts the messages at or above the cursor, below
/// `distributed`, that are not waiting there: finished or held ones, and numbers whose segment is gone.
class Channel {
 public:
  Channel(Topic& of, std::string channel_name)
      : topic(of), name(std::move(channel_name)), ephemeral(is_ephemeral(name)), bounded(ephemeral || !of.log.kept()), since(of.broker.metadata_version + 1), broker_(of.broker),
        cursor_(of.distributed()), counted_from_(cursor_), deferred_timer_(broker_.timers, [this] { release_due(); }),
        due_book_(bounded ? std::string() : text(broker_.storage.directory, "/", of.name, ":", name, ".due")),
        near_first_(topology_aware(broker_.options)) {
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
  const uint64_t since;  // the version of the metadata that has it
  std::vector<std::unique_ptr<Consumer>> consumers;  // with a client
  uint64_t requeue_count = 0, timeout_count = 0;
  uint64_t zone_local_count = 0, region_local_count = 0, global_count = 0;
  std::unique_ptr<LatencySketch> latency;

  // ---- for the statistics ----------------------------------------------------------------------------------------------

  int64_t depth() const { return static_cast<int64_t>(topic.distributed() - cursor_) - aside_ + static_cast<int64_t>(requeued_.size()); }
  int64_t in_flight_count() const { return static_cast<int64_t>(in_flight_.size()); }
  int64_t deferred_count() const { return static_cast<int64_t>(deferred_.size()); }
  uint64_t message_count() const { return topic.distributed() - counted_from_; }
  /// Of the depth, what lies in segments that are not mapped.
  int64_t backend_depth() const {
    int64_t unmapped = 0;
    for (const auto& segment : topic.log.segments) {
      const uint64_t end = std::min(segment->end(), topic.distributed()), begin = std::max(segment->first, cursor_);
      if (!segment->file.mapped() && end > begin && needs(*segment)) unmapped += static_cast<int64_t>(end - begin);
    }
    return std::clamp<int64_t>(unmapped, 0, std::max<int64_t>(0, depth()));
  }

  // ---- for the sessions: finish, requeue and touch return why they failed, or nothing ----------------------------------

  Consumer& subscribe(Port& port, const ClientInfo& info, Duration msg_timeout, int sample_rate) {
    consumers.push_back(std::make_unique<Consumer>(*this, broker_.timers, port, info, msg_timeout, sample_rate, [this](Consumer& late) { expire(late); }));
    port.consumer = consumers.back().get();
    return *port.consumer;
  }

  /// Its messages stay in flight until they time out, as with nsqd. The last one takes an ephemeral channel with it.
  void unsubscribe(Consumer& consumer) {
    auto found = std::find_if(consumers.begin(), consumers.end(), [&](const auto& c) { return c.get() == &consumer; });
    ready_.erase(std::remove(ready_.begin(), ready_.end(), &consumer), ready_.end());
    consumer.port->consumer = nullptr;
    consumer.port = nullptr;
    consumer.info = nullptr;
    if (consumer.in_flight > 0) orphans_.push_back(std::move(*found));
    consumers.erase(found);
    if (ephemeral && consumers.empty()) topic.delete_channel(*this);
  }

  /// The same, but what it has in flight is requeued at once.
  void give_back(Consumer& consumer) {
    while (consumer.oldest != InFlight::kNone) put_back(let_go(consumer.oldest));
    unsubscribe(consumer);
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
    const uint32_t which = owned(consumer, id, why);
    if (which == InFlight::kNone) return why;
    const Place place = let_go(which);
    ++consumer.finished;
    if (latency != nullptr && open(place).ok()) latency->add(broker_.now.wall - frame_timestamp(place), broker_.now.steady);
    finish(place);
    consider(consumer);
    return {};
  }

  std::string_view requeue(Consumer& consumer, const MessageId& id, int64_t delay) {
    std::string_view why;
    const uint32_t which = owned(consumer, id, why);
    if (which == InFlight::kNone) return why;
    const Place place = let_go(which);
    ++consumer.requeued;
    ++requeue_count;
    if (delay == 0) put_back(place);
    else put_off(place, delay);
    consider(consumer);
    return {};
  }

  std::string_view touch(Consumer& consumer, const MessageId& id, int64_t msg_timeout) {
    std::string_view why;
    const uint32_t which = owned(consumer, id, why);
    if (which == InFlight::kNone) return why;
    unlink(which);
    Held& held = in_flight_[which];
    const int64_t latest = saturating_add(held.delivered_at, broker_.options.max_msg_timeout.count());
    held.deadline = std::min(saturating_add(broker_.now.steady, msg_timeout), latest);
    link(which);
    return {};
  }

  void pause(bool pause) {
    paused = pause;
    broker_.metadata_changed = broker_.metadata_awaited = true;
    broker_.touch(topic);
  }

  /// Everything that the channel was given counts as finished from here on.
  void empty() {
    for (auto& consumer : consumers) {
      consumer->in_flight = 0;
      consumer->oldest = consumer->newest = InFlight::kNone;
      consumer->timer.set(kNever);
    }
    orphans_.clear();
    in_flight_ = InFlight();
    requeued_.clear();
    deferred_.clear();
    deferred_timer_.set(kNever);
    due_book_.clear();
    for (auto& [first, states] : states_) states->held = 0;
    if (!topic.log.segments.empty() && states_of(*topic.log.segments.back()) == nullptr) begin_states(*topic.log.segments.back());
    skip_to_end(0);
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
    consumers.clear();
    ready_.clear();
    leave();
    if (!remove_files) return;
    due_book_.remove();
    for (auto& [first, states] : states_) states->file.remove();
    states_.clear();
  }

  // ---- for the topic ---------------------------------------------------------------------------------------------------

  bool hungry() const { return !ready_.empty(); }

  /// Gives out what waits, for as long as a consumer can take it: in turns, with runs as long as an even share allows.
  void pump() {
    static constexpr size_t kLongestRun = 512;  // messages; long enough to be cheap, short enough to be fair
    while (broker_.serving && !paused && !ready_.empty()) {
      if (near_first_) bring_near_one_forward();
      Consumer& consumer = *ready_.front();
      if (consumer.can_take()) {
        const size_t share = static_cast<size_t>(std::max<int64_t>(depth(), 1)) / ready_.size();
        if (deliver(consumer, std::clamp<size_t>(share, 1, kLongestRun)) == 0) return;
      }
      ready_.pop_front();
      consumer.listed = consumer.can_take();
      if (consumer.listed) ready_.push_back(&consumer);
    }
  }

  /// Drops the newest messages above the bound, behind what the ready consumers took.
  void trim() {
    int64_t excess = depth() - broker_.options.mem_queue_size;
    if (excess > 0 && !topic.log.segments.empty()) reach(*topic.log.segments.back());
    for (auto it = states_.rbegin(); it != states_.rend() && excess > 0; ++it) {
      States& states = *it->second;
      if (!open({&states, 0}).ok()) return;
      const uint64_t end = std::min(states.segment->end(), topic.distributed());
      for (uint64_t number = end; number > std::max(cursor_, it->first) && excess > 0; --number) {
        const auto i = static_cast<uint32_t>(number - 1 - it->first);
        if (states.get(i) != 0 || states.segment->deferred(i)) continue;
        states.finish(i, i + 1);
        ++aside_;
        --excess;
      }
    }
  }

  /// Takes over a message that was published with a delay.
  void defer(uint64_t number, int64_t due_wall) {
    Segment* segment = topic.log.at(number);
    reach(*segment);
    push_deferred({states_of(*segment), static_cast<uint32_t>(number - segment->first)}, steady(due_wall));
    if (number >= cursor_) ++aside_;
  }

  States* states_of(const Segment& segment) const {
    const auto found = states_.find(segment.first);
    return found == states_.end() ? nullptr : found->second.get();
  }
  void adopt_states(std::unique_ptr<States> states) { states_[states->segment->first] = std::move(states); }
  /// Whether there is, or will be, something for this channel in a segment. See States.
  bool needs(const Segment& segment) const {
    return states_.empty() || segment.first > states_.rbegin()->first || states_.count(segment.first) > 0;
  }
  /// The same for a segment that is about to be the last one.
  void reach_new(Segment& segment) {
    if (!topic.log.segments.empty()) reach(*topic.log.segments.back());
    begin_states(segment);
  }
  /// Makes the states of all segments up to this one, in order.
  void reach(Segment& segment) {
    States* latest = states_.empty() ? nullptr : states_.rbegin()->second.get();
    for (auto& each : topic.log.segments)
      if (each->first <= segment.first && (latest == nullptr || each->first > latest->segment->first)) begin_states(*each);
    if (latest != nullptr && latest->segment->sealed && latest->finished == latest->segment->count) retire(*latest, false);
  }
  Status add_states(Segment& segment, uint32_t finished_below) {
    auto states = std::make_unique<States>(bounded ? std::string() : topic.log.path(name, segment.first, ".state"), segment);
    Status status = states->file.create(broker_.storage);
    if (!status.ok()) return status;
    states->finish(0, finished_below);
    for (uint32_t i : segment.damaged) states->finish(i, i + 1);
    FileHeader::write(states->file, States::kMagic, segment.first, segment.capacity());
    states->file.touch(broker_.storage);
    adopt_states(std::move(states));
    return status;
  }

  /// A sealed segment whose messages are all finished is not needed any more. `drained`: there is none behind it, either.
  void segment_sealed(Segment& segment, bool drained) {
    States* states = states_of(segment);
    if (states != nullptr && states->finished == segment.count) retire(*states, drained);
  }

  /// The topic was emptied of what it had not handed over yet.
  void skip_undistributed(uint64_t from) {
    reach(*topic.log.segments.back());
    skip_to_end(from);
    counted_from_ += topic.distributed() - from;
  }

  /// Gives back the memory of states that are not looked at now.
  void cool() {
    for (auto& [first, states] : states_)
      if (states->held == 0 && states.get() != at_ && states->segment->sealed) states->file.close();
  }

  /// Takes up its place after a restart: what was delivered before and not finished comes first, with its attempts; what was
  /// put off waits for its time; the cursor is at the first message never delivered.
  void resume(size_t due_book_size) {
    const auto due = due_book_.load_entries(due_book_size);
    std::vector<States*> done;
    bool found = false;
    uint64_t expected = 0;
    counted_from_ = cursor_ = topic.distributed();
    for (auto& each : topic.log.segments) {
      Segment& segment = *each;
      if (!needs(segment)) continue;
      if (segment.deferred_records > 0 || !segment.damaged.empty()) reach(segment);
      if (found) aside_ += static_cast<int64_t>(segment.first - expected);
      expected = segment.end();
      const auto handed = static_cast<uint32_t>(std::clamp(topic.distributed(), segment.first, segment.end()) - segment.first);
      States* states = states_of(segment);
      if (states == nullptr) {  // it did not get there yet: all of it waits
        if (!found && handed > 0) cursor_ = segment.first;
        found = found || handed > 0;
        continue;
      }
      if (!open({states, 0}).ok()) throw std::runtime_error(text("cannot map ", states->file.path(), " and its segment"));
      states->clean_up();
      for (uint32_t i = 0; i < handed; ++i) {
        const uint16_t state = states->get(i);
        const bool waiting = state == 0 && !segment.deferred(i);
        if (waiting && !found) cursor_ = segment.first + i;
        found = found || waiting;
        if (waiting) continue;
        if (found) ++aside_;
        if (state != States::kFinished) take_up({states, i}, due);
      }
      if (segment.sealed && states->finished == segment.count) done.push_back(states);
      if (states->held == 0) states->file.close();
    }
    for (States* states : done) retire(*states, false);
  }

 private:
  struct Requeued {
    Place place;
    uint64_t behind;  // goes out when the cursor has passed this number: its turn in the queue
  };
  struct Deferred {
    int64_t due;  // monotonic
    Place place;
    bool operator<(const Deferred& other) const { return due > other.due; }  // the heap's top is the earliest
  };

  // ---- messages in flight ----------------------------------------------------------------------------------------------

  uint32_t owned(Consumer& consumer, const MessageId& id, std::string_view& why) {
    const uint32_t which = in_flight_.find(id);
    if (which == InFlight::kNone) why = "ID not in flight";
    else if (in_flight_[which].owner != &consumer) why = "client does not own message";
    return why.empty() ? which : InFlight::kNone;
  }

  void hold(Consumer& consumer, const Place& place, const char* frame) {
    const uint16_t attempts = place.states->get(place.index);
    place.states->set(place.index, std::min<uint16_t>(static_cast<uint16_t>(attempts + 1), States::kMost));
    ++place.states->held;
    const uint32_t which = in_flight_.insert(Segment::id_of(frame));
    Held& held = in_flight_[which];
    held.states = place.states;
    held.index = place.index;
    held.owner = &consumer;
    held.delivered_at = broker_.now.steady;
    held.deadline = saturating_add(held.delivered_at, consumer.msg_timeout);
    link(which);
    ++consumer.in_flight;
    ++consumer.delivered;
  }

  Place let_go(uint32_t which) {
    const Place place{in_flight_[which].states, in_flight_[which].index};
    unlink(which);
    --in_flight_[which].owner->in_flight;
    in_flight_.erase(which);
    --place.states->held;
    return place;
  }

  /// Puts a message in flight into its owner's list by its deadline: nearly always at the end.
  void link(uint32_t which) {
    Held& held = in_flight_[which];
    Consumer& owner = *held.owner;
    uint32_t after = owner.newest;
    while (after != InFlight::kNone && in_flight_[after].deadline > held.deadline) after = in_flight_[after].earlier;
    held.earlier = after;
    held.later = after == InFlight::kNone ? owner.oldest : in_flight_[after].later;
    (held.earlier == InFlight::kNone ? owner.oldest : in_flight_[held.earlier].later) = which;
    (held.later == InFlight::kNone ? owner.newest : in_flight_[held.later].earlier) = which;
    if (owner.timer.due() > held.deadline) owner.timer.set(held.deadline);  // an earlier one looks at the list when it fires
  }
  void unlink(uint32_t which) {
    const Held& held = in_flight_[which];
    (held.earlier == InFlight::kNone ? held.owner->oldest : in_flight_[held.earlier].later) = held.later;
    (held.later == InFlight::kNone ? held.owner->newest : in_flight_[held.later].earlier) = held.earlier;
  }

  void expire(Consumer& consumer) {
    while (consumer.oldest != InFlight::kNone && in_flight_[consumer.oldest].deadline <= broker_.now.steady) {
      ++timeout_count;
      put_back(let_go(consumer.oldest));
    }
    if (consumer.oldest != InFlight::kNone) consumer.timer.set(in_flight_[consumer.oldest].deadline);
    if (consumer.port != nullptr) return consider(consumer);
    auto found = std::find_if(orphans_.begin(), orphans_.end(), [&](const auto& c) { return c.get() == &consumer; });
    if (consumer.in_flight == 0) orphans_.erase(found);
  }

  // ---- requeued and deferred messages ----------------------------------------------------------------------------------

  /// Behind everything that waits, as nsqd does it.
  void put_back(const Place& place) {
    ++place.states->held;
    requeued_.push_back({place, topic.distributed()});
    broker_.touch(topic);
  }

  void put_off(const Place& place, int64_t delay) {
    const Now& now = broker_.now;
    push_deferred(place, saturating_add(now.steady, delay));
    const Status status = due_book_.add({place.number(), saturating_add(now.wall, delay)}, broker_.storage, [&] {
      std::vector<DueBook::Entry> live;
      for (const Deferred& deferred : deferred_) live.emplace_back(deferred.place.number(), saturating_add(deferred.due, now.wall - now.steady));
      return live;
    });
    if (!status.ok()) broker_.logger.say(Level::kError, "CHANNEL(", name, "): a delay would not survive a restart - ", status.error);
  }

  /// The monotonic time of a due time by the wall clock, within the bounds that a delay has.
  int64_t steady(int64_t due_wall) const {
    const int64_t most = broker_.options.max_req_timeout.count();
    return saturating_add(broker_.now.steady, due_wall <= broker_.now.wall ? 0 : std::min(due_wall - broker_.now.wall, most));
  }

  void push_deferred(const Place& place, int64_t due) {
    ++place.states->held;
    deferred_.push_back({due, place});
    std::push_heap(deferred_.begin(), deferred_.end());
    deferred_timer_.set(deferred_.front().due);
  }

  void release_due() {
    while (!deferred_.empty() && deferred_.front().due <= broker_.now.steady) {
      std::pop_heap(deferred_.begin(), deferred_.end());
      const Place place = deferred_.back().place;
      deferred_.pop_back();
      --place.states->held;
      put_back(place);
    }
    if (deferred_.empty()) due_book_.clear();
    else deferred_timer_.set(deferred_.front().due);
  }

  /// A message that an earlier process had delivered, or was published with a delay.
  void take_up(const Place& place, const std::unordered_map<uint64_t, int64_t>& due) {
    const Segment& segment = *place.states->segment;
    const auto entry = due.find(place.number());
    const int64_t due_wall = entry != due.end() ? entry->second : segment.deferred(place.index) ? segment.due_of(place.index) : 0;
    if (due_wall > broker_.now.wall) return push_deferred(place, steady(due_wall));
    ++place.states->held;
    requeued_.push_back({place, 0});
  }

  // ---- delivery --------------------------------------------------------------------------------------------------------

  /// Maps what a message needs to be looked at.
  static Status open(const Place& place) {
    Status status = place.states->file.open();
    return status.ok() ? place.states->segment->file.open() : status;
  }
  static int64_t frame_timestamp(const Place& place) { return static_cast<int64_t>(get_be<uint64_t>(place.states->segment->frame(place.index) + 8)); }

  /// Moves the cursor to the next message that waits; false when there is none, or when its files cannot be read now.
  bool find_waiting() {
    const uint64_t end = topic.distributed();
    while (cursor_ < end) {
      if ((at_ == nullptr || cursor_ >= at_->segment->end()) && !enter_next()) return false;
      const Status status = open({at_, 0});
      if (!status.ok()) broker_.logger.say(Level::kError, "CHANNEL(", name, "): cannot read - ", status.error);
      if (!status.ok()) return false;
      const Segment& segment = *at_->segment;
      const auto limit = static_cast<uint32_t>(std::min(end, segment.end()) - segment.first);
      for (auto i = static_cast<uint32_t>(cursor_ - segment.first); i < limit; ++i, ++cursor_, --aside_)
        if (at_->get(i) == 0 && !segment.deferred(i)) return true;
    }
    return false;
  }

  /// Takes the cursor into the segment of its number, or of the next one that there is.
  bool enter_next() {
    Segment* next = topic.log.at(cursor_);
    while (next != nullptr && !needs(*next)) next = topic.log.at(next->end());
    if (next == nullptr) return false;
    if (next->first > cursor_) {  // what lay between is gone
      aside_ -= static_cast<int64_t>(next->first - cursor_);
      cursor_ = next->first;
    }
    leave();
    reach(*next);
    at_ = states_of(*next);
    ++at_->segment->cursors;
    return true;
  }
  void leave() {
    if (at_ == nullptr) return;
    --at_->segment->cursors;
    at_ = nullptr;
    broker_.cool_later(topic);
  }

  /// With topology-aware consumption, a ready consumer in this zone comes before one in this region, and that before others.
  void bring_near_one_forward() {
    const auto distance = [](const Consumer* c) { return !c->can_take() ? 3 : c->info->zone_local ? 0 : c->info->region_local ? 1 : 2; };
    const auto nearest = std::min_element(ready_.begin(), ready_.end(), [&](const Consumer* a, const Consumer* b) { return distance(a) < distance(b); });
    std::rotate(ready_.begin(), nearest, nearest + 1);
  }

  /// How many messages it took from the queue for this consumer; 0 when none waits.
  size_t deliver(Consumer& consumer, size_t most) {
    const bool any = find_waiting();
    const bool first_time = any && (requeued_.empty() || requeued_.front().behind > cursor_);
    if (!any && requeued_.empty()) return 0;
    if (first_time && consumer.sample_rate == 0) return deliver_run(consumer, most);
    const Place place = first_time ? Place{at_, static_cast<uint32_t>(cursor_ - at_->segment->first)} : requeued_.front().place;
    if (!open(place).ok()) return 0;
    if (first_time && !sampled_out(consumer)) return deliver_run(consumer, 1);
    if (first_time) {
      ++cursor_;
      finish(place);
      return 1;
    }
    requeued_.pop_front();
    --place.states->held;
    broker_.cool_later(topic);
    if (sampled_out(consumer)) finish(place);
    else deliver_again(consumer, place);
    return 1;
  }

  /// A copy of the frame with the number of this attempt; it stops at 65535, where nsqd would begin again at 0.
  void deliver_again(Consumer& consumer, const Place& place) {
    const char* frame = place.states->segment->frame(place.index);
    std::string copy(frame, Segment::frame_size(frame));
    put_be(&copy[16], static_cast<uint16_t>(place.states->get(place.index) + 1));
    in_flight_.reserve(1);
    hold(consumer, place, frame);
    consumer.port->out.append(copy);
    consumer.port->attend();
    count_locality(*consumer.info, 1);
  }

  /// First deliveries, straight from the segment: neighbours go out as one piece of memory.
  size_t deliver_run(Consumer& consumer, size_t most) {
    States& states = *at_;
    const Segment& segment = *states.segment;
    const auto begin = static_cast<uint32_t>(cursor_ - segment.first);
    uint64_t last = std::min({topic.distributed(), segment.end(), cursor_ + most, cursor_ + static_cast<uint64_t>(consumer.rdy - consumer.in_flight)});
    if (!requeued_.empty()) last = std::min(last, requeued_.front().behind);
    const auto end = static_cast<uint32_t>(last - segment.first);
    in_flight_.reserve(end - begin);
    const char* run = segment.frame(begin);
    const char* run_end = run;
    uint32_t i = begin;
    for (; i < end && static_cast<size_t>(run_end - run) < Consumer::kMostOutput; ++i) {
      if (states.get(i) != 0 || segment.deferred(i)) break;
      const char* frame = segment.frame(i);
      hold(consumer, {&states, i}, frame);
      run_end = frame + Segment::frame_size(frame);
    }
    cursor_ += i - begin;
    states.file.touch(broker_.storage);
    consumer.port->out.append_mapped(run, static_cast<size_t>(run_end - run));
    consumer.port->attend();
    count_locality(*consumer.info, i - begin);
    return i - begin;
  }

  /// sample_rate r passes (r + 1) % and destroys the rest, for the whole channel, as nsqd 1.3.0 does.
  bool sampled_out(const Consumer& consumer) {
    if (consumer.sample_rate == 0) return false;
    dice_ ^= dice_ << 13;  // xorshift: even enough for this
    dice_ ^= dice_ >> 17;
    dice_ ^= dice_ << 5;
    return static_cast<int>(dice_ % 100) > consumer.sample_rate;
  }
  void count_locality(const ClientInfo& info, size_t messages) {
    (info.zone_local ? zone_local_count : info.region_local ? region_local_count : global_count) += messages;
  }

  // ---- the end of a message --------------------------------------------------------------------------------------------

  void finish(const Place& place) {
    States& states = *place.states;
    if (!states.file.open().ok()) return;  // it will come again after a restart
    states.set(place.index, States::kFinished);
    states.file.touch(broker_.storage);
    ++broker_.storage.operations;
    if (++states.finished < states.segment->count) return;
    if (states.segment->sealed) retire(states, false);
    else if (states.segment->file.size() > kWarmSegment) topic.retire_drained_tail();
  }

  /// Makes the states of a segment; in memory where the disk is full, so that consumers go on: then a restart delivers again.
  void begin_states(Segment& segment) {
    Status status = add_states(segment, 0);
    if (!status.ok()) {
      broker_.spares.remove_all();
      status = add_states(segment, 0);
    }
    if (status.ok()) return;
    broker_.logger.say(Level::kError, "CHANNEL(", name, "): what it finishes would be delivered again after a restart - ", status.error);
    auto states = std::make_unique<States>(std::string(), segment);
    if (!states->file.create(broker_.storage).ok()) throw std::bad_alloc();
    for (uint32_t i : segment.damaged) states->finish(i, i + 1);
    adopt_states(std::move(states));
  }

  /// This channel needs the segment no more. The latest states stay until there are later ones, unless all is drained; where
  /// the disk is so full that those cannot be made, the space of this segment is given back first.
  void retire(States& states, bool drained) {
    Segment& segment = *states.segment;
    const bool latest = !drained && states_.rbegin()->first == segment.first;
    Segment* next = latest ? topic.log.at(segment.end()) : nullptr;
    if (latest && next == nullptr) return;
    const bool begun = !latest || add_states(*next, 0).ok();
    if (cursor_ >= segment.first && cursor_ < segment.end()) {
      aside_ -= static_cast<int64_t>(segment.end() - cursor_);
      cursor_ = segment.end();
    }
    if (at_ == &states) leave();
    states.file.remove();
    states_.erase(segment.first);
    topic.release_if_done(segment);
    if (!begun) begin_states(*next);
    keep_states();
  }

  /// There is room again, perhaps: for the states that had to be begun in memory.
  void keep_states() {
    for (auto& [first, states] : states_) {
      if (bounded || !states->file.anonymous()) continue;
      if (!states->file.move_to(topic.log.path(name, first, ".state"), broker_.storage).ok()) return;
      FileHeader::write(states->file, States::kMagic, first, states->segment->capacity());
      states->file.touch(broker_.storage);
    }
  }

  /// Finishes all messages in [from, distributed).
  void skip_to_end(uint64_t from) {
    const uint64_t end = topic.distributed();
    std::vector<States*> done;
    for (auto& [first, states] : states_) {
      Segment& segment = *states->segment;
      if (end <= first || segment.end() <= from || !states->file.open().ok()) continue;
      states->finish(static_cast<uint32_t>(std::max(from, first) - first), static_cast<uint32_t>(std::min(end, segment.end()) - first));
      states->file.touch(broker_.storage);
      if (segment.sealed && states->finished == segment.count) done.push_back(states.get());
    }
    if (cursor_ >= from) {
      leave();
      cursor_ = end;
      aside_ = 0;
    } else {
      aside_ += static_cast<int64_t>(end - from);
    }
    for (States* states : done) retire(*states, false);
    broker_.cool_later(topic);
  }

  Broker& broker_;
  std::map<uint64_t, std::unique_ptr<States>> states_;  // by the number of the segment's first message
  uint64_t cursor_;          // number of the next message never yet delivered
  States* at_ = nullptr;     // those that the cursor is in, once it was looked up
  int64_t aside_ = 0;
  uint64_t counted_from_;    // message_count is distributed - counted_from
  InFlight in_flight_;
  std::deque<Requeued> requeued_;
  std::vector<Deferred> deferred_;
  Timer deferred_timer_;
  DueBook due_book_;
  std::deque<Consumer*> ready_;  // those that can take a message, the one that waited longest first
  std::vector<std::unique_ptr<Consumer>> orphans_;  // without a client, until what they had in flight has timed out
  const bool near_first_;
  uint32_t dice_ = 2463534242u;
};

// ---- Topic -----------------------------------------------------------------------------------------------------------

inline Topic::Topic(Broker& of, std::string topic_name)
    : broker(of), name(std::move(topic_name)), ephemeral(is_ephemeral(name)),
      log(of.storage, of.spares, name, !ephemeral, 
          [this](Segment& segment) { prepare(segment); }, [this](Segment& segment) { wind_up(segment, false); }) {}

inline Status Topic::publish(const std::string_view* bodies, size_t count, int64_t delay) {
  const Now& now = broker.now;
  const int64_t due = delay > 0 ? saturating_add(now.wall, delay) : 0;
  if (!flows() && !log.kept()) {  // in memory only and nobody to take it: what is above the bound is dropped, and the publisher told OK
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
  if (status.ok() && log.kept()) broker.storage.full.clear();
  if (flows()) distribute();
  return status;
}

/// Hands what was stored to the channels: for all but deferred messages nothing but a number changes.
inline void Topic::distribute() {
  const uint64_t from = std::exchange(distributed_, log.end());
  for (auto segment = log.segments.rbegin(); segment != log.segments.rend() && (*segment)->end() > from; ++segment) {
    if ((*segment)->deferred_records == 0 || !(*segment)->file.open().ok()) continue;
    for (uint64_t number = std::max(from, (*segment)->first); number < (*segment)->end(); ++number) {
      const auto i = static_cast<uint32_t>(number - (*segment)->first);
      if (!(*segment)->deferred(i)) continue;
      for (auto& [channel_name, channel] : channels) channel->defer(number, (*segment)->due_of(i));
    }
  }
  broker.touch(*this);
}

/// Where nsqd.dat does not know a channel yet, its states tell the next start of it.
inline void Topic::prepare(Segment& segment) {
  segment.set_mark(flows() ? Segment::kFollows : 0, broker.storage);
  for (auto& [channel_name, channel] : channels)
    if (channel->since > broker.metadata_persisted && !channel->bounded) channel->reach_new(segment);
}

inline void Topic::wind_up(Segment& segment, bool drained) {
  ++segment.pins;  // so that it is still there when the last of them lets go
  for (auto& [channel_name, channel] : channels) channel->segment_sealed(segment, drained);
  --segment.pins;
  release_if_done(segment);
  broker.cool_later(*this);
}

inline Channel* Topic::find(std::string_view channel) {
  auto found = channels.find(channel);
  return found == channels.end() ? nullptr : found->second.get();
}

inline Channel* Topic::channel(std::string_view channel_name, Status& status) {
  if (Channel* found = find(channel_name)) return found;
  auto made = std::make_unique<Channel>(*this, std::string(channel_name));
  if (!log.segments.empty()) {  // it begins in the segment of the first message that it gets, or in the last one
    Segment* segment = log.at(distributed_) != nullptr ? log.at(distributed_) : log.segments.back().get();
    status = made->add_states(*segment, static_cast<uint32_t>(std::clamp(distributed_, segment->first, segment->end()) - segment->first));
    if (!status.ok()) {
      broker.storage.full = status.error;
      made->close(true);
      return nullptr;
    }
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

inline void Topic::update_flow() {
  if (flows()) {
    distribute();
    for (auto& segment : log.segments)
      if (marked_ && segment->file.open().ok() && segment->mark() != Segment::kFollows) segment->set_mark(Segment::kFollows, broker.storage);
    marked_ = false;
  } else {
    mark_segments();
  }
  broker.cool_later(*this);
}

/// Notes in the files how far the messages were handed over.
inline void Topic::mark_segments() {
  marked_ = true;
  for (auto& segment : log.segments) {
    if (segment->end() < distributed_ || !segment->file.open().ok()) continue;
    segment->set_mark(static_cast<uint32_t>(std::max(distributed_, segment->first) - segment->first), broker.storage);
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
  const uint64_t from = std::exchange(distributed_, log.end());
  if (from == distributed_) return;
  for (auto& [channel_name, channel] : channels) channel->skip_undistributed(from);
  mark_segments();
  release_done();
}

inline void Topic::release_if_done(Segment& segment) {
  const auto needed = [&segment](const auto& entry) { return entry.second->needs(segment); };
  if (segment.pins == 0 && segment.sealed && segment.end() <= distributed_ && std::none_of(channels.begin(), channels.end(), needed)) log.release(segment);
}

inline void Topic::release_done() {
  std::vector<Segment*> all;
  for (auto& segment : log.segments) all.push_back(segment.get());
  for (Segment* segment : all) release_if_done(*segment);
}

/// When the last segment is a large one and every channel has finished all of it, its space is given back, too.
inline void Topic::retire_drained_tail() {
  Segment* tail = log.tail();
  if (tail == nullptr || tail->end() > distributed_) return;
  for (auto& [channel_name, channel] : channels) {
    const States* states = channel->states_of(*tail);
    if (states == nullptr || states->finished < tail->count) return;
  }
  tail->sealed = true;
  wind_up(*tail, true);
}

inline void Topic::close(bool remove_files) {
  broker.logger.say(Level::kInfo, "TOPIC(", name, "): ", remove_files ? "deleting" : "closing");
  for (auto& [channel_name, channel] : channels) channel->close(remove_files);
  if (remove_files) log.remove_all();
}

inline void Topic::pump() {
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

inline void Topic::cool() {
  for (auto& segment : log.segments)
    if (!segment->warm()) segment->file.close();
  for (auto& [channel_name, channel] : channels) channel->cool();
}

inline int64_t Topic::backend_depth() const {
  int64_t unmapped = 0;
  for (const auto& segment : log.segments)
    if (!segment->file.mapped() && segment->end() > distributed_) unmapped += static_cast<int64_t>(segment->end() - std::max(distributed_, segment->first));
  return unmapped;
}

inline void Topic::load(std::vector<std::unique_ptr<Segment>> segments) {
  for (auto& segment : segments) log.adopt(std::move(segment));
  distributed_ = log.end();
  for (auto& segment : log.segments) {
    const uint32_t mark = segment->mark();
    if (mark >= segment->count) continue;
    distributed_ = segment->first + mark;
    break;
  }
}

inline void Topic::hand_over_imported() {
  distributed_ = log.end();
  if (!flows()) mark_segments();
}

// ---- Broker ----------------------------------------------------------------------------------------------------------

inline Topic* Broker::find(std::string_view topic) {
  auto found = topics.find(topic);
  return found == topics.end() ? nullptr : found->second.get();
}

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
  auto gone = std::move(topics.find(topic.name)->second);
  topics.erase(topic.name);
  for (auto* list : {&touched_, &cooling_}) list->erase(std::remove(list->begin(), list->end(), gone.get()), list->end());
  for (auto& [name, channel] : gone->channels) changed(*gone, channel.get(), false);
  changed(*gone, nullptr, false);
}

inline void Broker::changed(const Topic& topic, const Channel* channel, bool created) {
  if (!topic.ephemeral && !(channel != nullptr && channel->ephemeral)) metadata_changed = true;
  ++metadata_version;
  if (on_change) on_change(topic, channel, created);
}

inline void Broker::touch(Topic& topic) {
  if (topic.touched) return;
  topic.touched = true;
  touched_.push_back(&topic);
}

inline void Broker::cool_later(Topic& topic) {
  if (topic.cooling) return;
  topic.cooling = true;
  cooling_.push_back(&topic);
}

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

/// The name of one of our files, taken apart: topic[:channel][.first message].kind
struct FileName {
  std::string name, topic, channel, kind;
  uint64_t first = 0;

  static std::optional<FileName> parse(std::string_view name) {
    FileName parsed;
    parsed.name = name;
    const size_t dot = name.rfind('.');
    if (dot == name.npos) return std::nullopt;
    parsed.kind = name.substr(dot + 1);
    name = name.substr(0, dot);
    if (parsed.kind == "segment" || parsed.kind == "state") {
      if (name.size() < 22 || name[name.size() - 21] != '.') return std::nullopt;
      const auto number = decimal(name.substr(name.size() - 20));
      if (!number) return std::nullopt;
      parsed.first = static_cast<uint64_t>(*number);
      name.remove_suffix(21);
    } else if (parsed.kind != "due") {
      return std::nullopt;
    }
    const size_t colon = name.find(':');
    parsed.topic = name.substr(0, colon);
    if (colon != name.npos) parsed.channel = name.substr(colon + 1);
    const bool of_channel = parsed.kind == "state" || parsed.kind == "due";
    if (!valid_name(parsed.topic) || of_channel != (colon != name.npos) || (of_channel && !valid_name(parsed.channel))) return std::nullopt;
    return parsed;
  }
};

inline std::vector<std::string> list_directory(const std::string& path) {
  std::unique_ptr<DIR, int (*)(DIR*)> directory(::opendir(path.c_str()), ::closedir);
  if (directory == nullptr) throw std::runtime_error(system_error("read directory", path).error);
  std::vector<std::string> names;
  while (const dirent* entry = ::readdir(directory.get())) names.emplace_back(entry->d_name);
  std::sort(names.begin(), names.end());
  return names;
}

inline size_t file_size(const std::string& path) {
  struct stat about {};
  return ::stat(path.c_str(), &about) == 0 ? static_cast<size_t>(about.st_size) : 0;
}

/// Reads what an earlier process left in the data path into a broker. Throws what must stop the start.
class Recovery {
 public:
  explicit Recovery(Broker& broker) : broker_(broker), directory_(broker.storage.directory) {}

  void run() {
    if (const auto content = read_file(directory_ + "/nsqd.dat")) take_names(Metadata::parse(*content, directory_ + "/nsqd.dat"));
    for (const std::string& name : list_directory(directory_)) sort(name);
    for (auto& [topic, firsts] : segments_) take_segments(topic, firsts);
    for (const FileName& state : states_) take_states(state);
    import_queues();
    for (auto& [name, topic] : broker_.topics) finish(*topic);
    broker_.after_write();
  }

 private:
  void take_names(const Metadata& metadata) {
    for (const Metadata::Topic& topic : metadata.topics) {
      if (!valid_name(topic.name)) {
        broker_.logger.say(Level::kWarning, "skipping creation of invalid topic ", topic.name);
        continue;
      }
      Topic& made = broker_.topic(topic.name);
      made.paused = made.paused || topic.paused;
      for (const Metadata::Channel& channel : topic.channels) {
        if (valid_name(channel.name)) need(made, channel.name).paused = channel.paused;
        else broker_.logger.say(Level::kWarning, "skipping creation of invalid channel ", channel.name);
      }
    }
  }

  Channel& need(Topic& topic, const std::string& name) {
    Status status;
    Channel* channel = topic.channel(name, status);
    if (channel == nullptr) throw std::runtime_error(text("failed to make the files of channel ", name, " - ", status.error));
    return *channel;
  }

  void sort(const std::string& name) {
    const std::string path = directory_ + "/" + name;
    if (name == "nsqd.dat.tmp" || ends_with(name, ".due.tmp") || ends_with(name, ".spare")) {  // of no use any more
      ::unlink(path.c_str());
    } else if (const size_t at = name.find(".diskqueue."); at != name.npos) {
      if (!ends_with(name, ".dat")) return;
      auto& files = queues_[name.substr(0, at)];
      if (const auto number = decimal(name.substr(at + 11, name.size() - at - 15))) files.insert(*number);
    } else if (const auto file = FileName::parse(name)) {
      if (file->kind == "segment") segments_[file->topic].push_back(file->first);
      else if (file->kind == "state") states_.push_back(*file);
      else due_books_[file->topic + ":" + file->channel] = path;
    }
  }

  void take_segments(const std::string& name, const std::vector<uint64_t>& firsts) {
    if (broker_.find(name) == nullptr) broker_.logger.say(Level::kWarning, "LOG: nsqd.dat does not name topic ", name, ", which has messages; taken up");
    Topic& topic = broker_.topic(name);
    std::vector<std::unique_ptr<Segment>> segments;
    for (size_t i = 0; i < firsts.size(); ++i) {
      const std::string path = topic.log.path("", firsts[i], ".segment");
      const size_t size = file_size(path);
      if (remove_if_blank(path, size)) continue;
      if (size < 4096) throw std::runtime_error(text(path, " is shorter than any segment; restore it from a copy, or move it away"));
      auto segment = std::make_unique<Segment>(path, size, firsts[i]);
      const Status status = segment->file.open();
      if (!status.ok()) throw std::runtime_error(status.error);
      const bool last = i + 1 == firsts.size();
      if (!segment->recover(last, broker_.logger)) {
        segment->file.remove();
        continue;
      }
      if (!segments.empty() && segments.back()->end() > segment->first) throw std::runtime_error(text(path, " overlaps the segment before it; restore the data path from a copy"));
      if (!last) segment->sealed = true;
      if (segment->count > 0) broker_.ids.skip_past(Segment::id_of(segment->frame(segment->count - 1)));
      segments.push_back(std::move(segment));
    }
    topic.load(std::move(segments));
  }

  /// A small file of zeros is one whose making was cut short.
  static bool remove_if_blank(const std::string& path, size_t size) {
    if (size > 4096) return false;
    const std::string content = read_file(path).value_or("");
    return content.find_first_not_of('\0') == content.npos && ::unlink(path.c_str()) == 0;
  }

  void take_states(const FileName& file) {
    Topic* topic = broker_.find(file.topic);
    Segment* segment = nullptr;
    if (topic != nullptr)
      for (auto& candidate : topic->log.segments)
        if (candidate->first == file.first) segment = candidate.get();
    if (segment == nullptr) {
      broker_.logger.say(Level::kInfo, "LOG: removing ", file.name, ", its segment is gone");
      ::unlink((directory_ + "/" + file.name).c_str());
      return;
    }
    auto states = std::make_unique<States>(topic->log.path(file.channel, file.first, ".state"), *segment);
    if (remove_if_blank(states->file.path(), file_size(states->file.path()))) return;
    if (file_size(states->file.path()) < states->file.size())
      throw std::runtime_error(text(states->file.path(), " is shorter than it was made; restore it from a copy, or remove it to have its messages delivered again"));
    const Status status = states->file.open();
    if (!status.ok()) throw std::runtime_error(status.error);
    const auto verdict = FileHeader::check(states->file, States::kMagic, segment->first, segment->capacity());
    if (verdict == FileHeader::Verdict::kUnfinished) {
      states->file.remove();
      return;
    }
    if (verdict == FileHeader::Verdict::kDamaged) {
      broker_.logger.say(Level::kWarning, "LOG: ", states->file.path(), " has a damaged header at offset 0; its states are kept");
      FileHeader::write(states->file, States::kMagic, segment->first, segment->capacity());
    }
    if (topic->find(file.channel) == nullptr) {
      broker_.logger.say(Level::kWarning, "LOG: nsqd.dat does not name channel ", file.channel, " of topic ", file.topic, ", which has messages; taken up");
      early_channels_.insert(file.topic + ":" + file.channel);
    }
    adopt(*topic, file.channel, std::move(states));
  }

  /// A channel whose states were found is not given new ones for the segments that it has none for.
  void adopt(Topic& topic, const std::string& channel, std::unique_ptr<States> states) {
    Channel* found = topic.find(channel);
    if (found == nullptr) found = topic.channels.emplace(channel, std::make_unique<Channel>(topic, channel)).first->second.get();
    found->adopt_states(std::move(states));
  }

  void finish(Topic& topic) {
    for (auto& [name, channel] : topic.channels) {
      const auto book = due_books_.find(topic.name + ":" + name);
      channel->resume(book == due_books_.end() ? 0 : file_size(book->second));
      if (early_channels_.count(topic.name + ":" + name) > 0) broker_.changed(topic, channel.get(), true);
    }
    topic.update_flow();
    topic.release_done();
    for (auto& segment : topic.log.segments) segment->file.close();
  }

  // ---- The disk queues of nsqd: one per topic and channel, records of 4 bytes length and a message -----------------------

  struct Position {
    int64_t file = 0;
    size_t offset = 0;
  };
  static constexpr size_t kBatch = 1000;  // messages between two syncs; what a kill during the import may double

  std::string queue_file(const std::string& queue, int64_t number) const {
    const std::string digits = std::to_string(number);
    return text(directory_, "/", queue, ".diskqueue.", std::string(6 - std::min<size_t>(6, digits.size()), '0'), digits, ".dat");
  }

  /// The queues of channels first: they are older than what their topic still holds.
  void import_queues() {
    for (const bool of_channels : {true, false}) {
      for (const auto& [queue, files] : queues_) {
        const size_t colon = queue.find(':');
        if ((colon != queue.npos) != of_channels) continue;
        const std::string topic = queue.substr(0, colon), channel = of_channels ? queue.substr(colon + 1) : "";
        if (!valid_name(topic) || is_ephemeral(topic) || (of_channels && !valid_name(channel))) {
          broker_.logger.say(Level::kWarning, "DISKQUEUE(", queue, "): left alone, it belongs to nothing that is kept");
          continue;
        }
        Topic& to = broker_.topic(topic);
        import_queue(queue, files, to, of_channels ? &need(to, channel) : nullptr);
      }
    }
  }

  void import_queue(const std::string& queue, const std::set<int64_t>& files, Topic& topic, Channel* channel) {
    Position at;
    size_t imported = 0;
    const std::string meta = queue + ".diskqueue.meta.dat";
    const auto content = read_file(directory_ + "/" + meta);
    long long depth = 0, number = 0, offset = 0;
    const bool known = content && std::sscanf(content->c_str(), "%lld\n%lld,%lld", &depth, &number, &offset) == 3 && number >= 0 && offset >= 0;
    if (known) at = {number, static_cast<size_t>(offset)};
    else broker_.logger.say(Level::kWarning, "DISKQUEUE(", queue, "): how far it was read is not known; all of it is taken");
    for (const int64_t file : files) {
      const std::string path = queue_file(queue, file);
      if (file > at.file) {
        if (known) broker_.logger.say(Level::kWarning, "DISKQUEUE(", queue, "): file ", at.file, " is missing; going on with ", file);
        at = {file, 0};
      }
      if (file == at.file) {
        imported += import_file(read_file(path).value_or(""), path, meta, at, topic, channel);
        at = {file + 1, 0};
        save_position(meta, at);
      }
      ::unlink(path.c_str());  // read, now or by the one before us
    }
    ::unlink((directory_ + "/" + meta).c_str());
    broker_.logger.say(Level::kInfo, "DISKQUEUE(", queue, "): took over ", imported, " messages of an earlier nsqd");
  }

  size_t import_file(const std::string& content, const std::string& path, const std::string& meta, Position& at, Topic& topic, Channel* channel) {
    size_t imported = 0;
    while (at.offset + 4 <= content.size()) {
      const auto size = get_be<uint32_t>(&content[at.offset]);
      if (size <= 26 || size > content.size() - at.offset - 4) break;
      import_message(std::string_view(content).substr(at.offset + 4, size), topic, channel);
      at.offset += 4 + size;
      if (++imported % kBatch == 0) {
        make_durable(topic, channel != nullptr);
        save_position(meta, at);
      }
    }
    make_durable(topic, channel != nullptr);
    if (at.offset < content.size()) {
      broker_.logger.say(Level::kWarning, "DISKQUEUE: ", path, " is broken off or damaged at offset ", at.offset, "; the rest is kept as ", path, ".bad");
      const Status status = replace_file(directory_, path.substr(directory_.size() + 1) + ".bad", std::string_view(content).substr(at.offset));
      if (!status.ok()) throw std::runtime_error(status.error);
    }
    return imported;
  }

  void import_message(std::string_view record, Topic& topic, Channel* channel) {
    const auto timestamp = static_cast<int64_t>(get_be<uint64_t>(record.data()));
    const auto attempts = get_be<uint16_t>(record.data() + 8);
    const Status status = topic.log.append(MessageId::from(record.data() + 10), timestamp, record.substr(26), 0);
    if (!status.ok()) throw std::runtime_error(text("failed to take over the queue of an earlier nsqd - ", status.error));
    topic.log.commit();
    if (channel == nullptr) return;
    Segment& tail = *topic.log.tail();
    for (auto& [name, other] : topic.channels) {
      other->reach(tail);
      States* states = other->states_of(tail);
      const auto mine = std::min(attempts, States::kMost);
      states->set(tail.count - 1, other.get() == channel ? mine : States::kFinished);
      states->file.touch(broker_.storage);
    }
  }

  /// What a channel's queue held has been handed over already; what a topic's held, has not.
  void make_durable(Topic& topic, bool handed_over) {
    if (handed_over) topic.hand_over_imported();
    for (const std::string& path : std::exchange(broker_.storage.dirty, {})) check(sync_path(path));
    check(sync_path(directory_));
    ++broker_.storage.epoch;
  }
  void save_position(const std::string& meta, const Position& at) {
    check(replace_file(directory_, meta, text("0\n", at.file, ",", at.offset, "\n", at.file, ",", at.offset, "\n")));
  }
  static void check(const Status& status) {
    if (!status.ok()) throw std::runtime_error(text("failed to take over the queue of an earlier nsqd - ", status.error));
  }

  Broker& broker_;
  const std::string directory_;
  std::map<std::string, std::vector<uint64_t>> segments_;  // by topic, ascending
  std::vector<FileName> states_;
  std::map<std::string, std::string> due_books_;  // topic:channel to path
  std::map<std::string, std::set<int64_t>> queues_;  // of nsqd: the numbers of their files
  std::set<std::string> early_channels_;
};

// ---------------------------------------------------------------------------------------------------------------------
// [9] Protocol V2
//
// What NSQ's clients speak over TCP: lines with commands, some with a body, answered by frames. And the contract of every
// session: bytes go in, bytes come out, and only the loop ([14]) touches the socket.
// Always: a command is carried out once, when all of it has arrived, and in the order of arrival; the number of messages
// that a client has in flight equals the number of Held that its Consumer owns.
// ---------------------------------------------------------------------------------------------------------------------

/// One side of a connection. The loop calls it; what it has to say it appends to port.out.
class Session : public std::enable_shared_from_this<Session> {
 public:
  virtual ~Session() = default;
  /// Carries out what is complete in `input` and returns how many bytes of it are done with. Whatever is left is given
  /// again, with what has arrived since.
  virtual size_t feed(std::string_view input) = 0;
  /// The peer sends no more; `rest` is what feed has left over.
  virtual void ended(std::string_view rest) = 0;
  /// More of the output was written, so there may be room for more of it.
  virtual void drained() {}
  virtual void connected() {}

  Port port;
  virtual ClientStats stats() const { return {}; }
  void unpark() {
    parked = false;
    resumed = true;
    port.attend();
  }
  bool late = false;       // its time for a command or request is up: treat its input as ended
  bool parked = false;     // it waits for another server's answer, and is not fed meanwhile
  bool resumed = false;    // it does so no more
  uint64_t written = 0;    // bytes that the loop has written for it
};

/// A name in an error's text, in quotes, as Go's %q writes it.
inline std::string quoted(std::string_view name) {
  std::string out = "\"";
  while (!name.empty()) {
    const size_t size = utf8_length(name);
    const char c = name[0];
    static constexpr std::string_view kPlain = "\a\b\f\n\r\t\v", kLetter = "abfnrtv";
    if (size > 1) out += name.substr(0, size);
    else if (c == '"' || c == '\\') out += '\\', out += c;
    else if (const size_t at = kPlain.find(c); at != kPlain.npos) out += '\\', out += kLetter[at];
    else if (size == 0 || static_cast<uint8_t>(c) < 0x20 || c == 0x7F) out += hex_escape("\\x", static_cast<uint8_t>(c), 2);
    else out += c;
    name.remove_prefix(std::max<size_t>(size, 1));
  }
  return out + "\"";
}

/// A pattern of an auth server: POSIX extended, so that no name can make it slow. nsqd's users write Go's patterns:
/// \d \w \s and their negations, escapes in brackets and non-capturing groups are put in POSIX's words.
class Pattern {
 public:
  explicit Pattern(const std::string& pattern) {
    auto compiled = std::make_unique<regex_t>();
    if (::regcomp(compiled.get(), translated(pattern).c_str(), REG_EXTENDED | REG_NOSUB) != 0) return;
    compiled_.reset(compiled.release(), [](regex_t* done_with) {
      ::regfree(done_with);
      delete done_with;
    });
  }
  bool valid() const { return compiled_ != nullptr; }
  bool matches(const std::string& name) const { return valid() && ::regexec(compiled_.get(), name.c_str(), 0, nullptr, 0) == 0; }

 private:
  static std::string translated(std::string_view rest) {
    static constexpr std::array<std::array<std::string_view, 2>, 6> kClasses = {{{"\\d", "[0-9]"}, {"\\D", "[^0-9]"},
        {"\\w", "[0-9A-Za-z_]"}, {"\\W", "[^0-9A-Za-z_]"}, {"\\s", "[[:space:]]"}, {"\\S", "[^[:space:]]"}}};
    std::string out;
    bool in_brackets = false;
    for (size_t size = 0; !rest.empty(); rest.remove_prefix(size)) {
      size = rest[0] == '\\' ? std::min<size_t>(2, rest.size()) : !in_brackets && rest.substr(0, 3) == "(?:" ? 3 : 1;
      const std::string_view item = rest.substr(0, size);
      const auto* known = std::find_if(kClasses.begin(), kClasses.end(), [item](const auto& entry) { return entry[0] == item; });
      if (known != kClasses.end()) out += in_brackets ? (*known)[1].substr(1, (*known)[1].size() - 2) : (*known)[1];
      else if (size == 2 && in_brackets) out += text("[.", item.substr(1), ".]");
      else out += size == 3 ? "(" : item;
      if (item == "[" || item == "]") in_brackets = item == "[";
    }
    return out;
  }
  std::shared_ptr<regex_t> compiled_;
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
    return std::any_of(authorizations.begin(), authorizations.end(), [&](const Authorization& a) {
      return (channel.empty() ? a.publish : a.subscribe) && a.topic.matches(topic) &&
             std::any_of(a.channels.begin(), a.channels.end(), [&](const Pattern& pattern) { return pattern.matches(channel); });
    });
  }
};

/// A member of what somebody has told about itself; null where there is none.
inline const Json& member_of(const Json& told, std::string_view key) {
  static const Json kNone;
  const Json* found = told.find(key);
  return found == nullptr ? kNone : *found;
}

/// Whether an IDENTIFY is what Go can decode: null is as good as nothing, and one member of a wrong type spoils the whole.
inline bool well_typed(const Json& told) {
  static constexpr auto kBool = Json::Type::kBool, kNumber = Json::Type::kNumber, kString = Json::Type::kString;
  static constexpr std::array<std::pair<std::string_view, Json::Type>, 15> kMembers = {{
      {"client_id", kString}, {"hostname", kString}, {"user_agent", kString}, {"topology_region", kString}, {"topology_zone", kString},
      {"heartbeat_interval", kNumber}, {"output_buffer_timeout", kNumber}, {"output_buffer_size", kNumber}, {"sample_rate", kNumber},
      {"msg_timeout", kNumber}, {"deflate_level", kNumber}, {"feature_negotiation", kBool}, {"tls_v1", kBool}, {"deflate", kBool},
      {"snappy", kBool}}};
  const int64_t rate = member_of(told, "sample_rate").integer().value_or(0);
  if (rate != static_cast<int32_t>(rate) || (!told.is(Json::Type::kObject) && !told.is(Json::Type::kNull))) return false;
  return std::all_of(kMembers.begin(), kMembers.end(), [&](const auto& entry) {
    const Json& member = member_of(told, entry.first);
    return member.is(Json::Type::kNull) || (member.is(entry.second) && (entry.second != kNumber || member.integer()));
  });
}

class V2Session;

/// What sessions need of the daemon around the broker.
struct Host {
  explicit Host(Broker& of) : broker(of) {}
  Broker& broker;
  int64_t started_wall = 0;
  std::function<void(V2Session&)> ask_auth;  // parks the session until auth_answered
  std::function<bool(std::string_view topic, Session& session)> look_up;  // true: parked until the new topic's channels are known
  std::function<void(const std::function<void(const V2Session&)>&)> each_client;
  std::function<void(std::vector<std::string>)> set_lookupds;
  std::function<size_t()> connections;
};

/// A client. Each command is a member function of its name, its steps return whether to go on: false after an error or, with
/// again_ set, when the command is to be tried again from its beginning.
class V2Session : public Session {
 public:
  V2Session(Host& host, std::string address, std::string ip)
      : host_(host), broker_(host.broker), ip_(std::move(ip)), connected_at_(broker_.now), last_command_(broker_.now.steady),
        timer_(broker_.timers, [this] { on_timer(); }) {
    info_.address = std::move(address);
    info_.client_id = info_.hostname = ip_;
    latest_.msg_timeout = broker_.options.msg_timeout.count();
    latest_.output_buffer_timeout = broker_.options.output_buffer_timeout.count();
    first_ = latest_;
    port.session = this;
    set_timer();
  }
  ~V2Session() override {
    if (port.consumer != nullptr) port.consumer->channel.unsubscribe(*port.consumer);
    broker_.logger.say(Level::kInfo, "PROTOCOL(V2): [", info_.address, "] exiting ioloop");
  }

  size_t feed(std::string_view input) override {
    size_t used = 0;
    if (input.size() < needed_) return 0;
    while (used < input.size() && !parked && !port.closing && !port.dropped) {
      const size_t size = step(input.substr(used), false);
      if (size == 0) break;
      used += size;
    }
    return used;
  }
  /// A command cut off within its body gets the error of that command; within its line, silence.
  void ended(std::string_view rest) override {
    if (!magic_seen_) broker_.logger.say(Level::kError, "failed to read protocol version - EOF");
    else if (!rest.empty() && !port.closing) step(rest, true);
    port.closing = true;
  }
  void drained() override {
    if (port.consumer != nullptr && !port.consumer->listed) port.consumer->channel.consider(*port.consumer);
  }

  /// The answer of the auth server has come (null: it cannot be used); the command that waits for it is tried again.
  void auth_answered(std::shared_ptr<const AuthGrant> grant) {
    auth_failed_ = grant == nullptr;
    if (grant != nullptr) grant_ = std::move(grant);
    unpark();
  }
  const std::string& secret() const { return secret_; }
  const std::string& ip() const { return ip_; }
  bool publishes() const { return !published_.empty(); }

  ClientStats stats() const override {
    ClientStats shown;
    shown.client_id = info_.client_id;
    shown.hostname = info_.hostname;
    shown.user_agent = info_.user_agent;
    shown.remote_address = info_.address;
    shown.topology_region = info_.topology_region;
    shown.topology_zone = info_.topology_zone;
    shown.state = static_cast<int>(state_);
    if (const Consumer* consumer = port.consumer) {
      shown.ready_count = consumer->rdy;
      shown.in_flight_count = consumer->in_flight;
      shown.message_count = static_cast<int64_t>(consumer->delivered);
      shown.finish_count = static_cast<int64_t>(consumer->finished);
      shown.requeue_count = static_cast<int64_t>(consumer->requeued);
    }
    shown.connected_at = connected_at_.wall / kSecond;
    shown.connected_for = broker_.now.steady - connected_at_.steady;
    shown.sample_rate = static_cast<int>(latest_.sample_rate);
    shown.authed = grant_ != nullptr;
    if (shown.authed) {
      shown.auth_identity = grant_->identity;
      shown.auth_identity_url = grant_->identity_url;
    }
    shown.pub_counts = published_;
    return shown;
  }

 private:
  enum class State { kInit = 0, kSubscribed = 3, kClosing = 4 };
  enum class Part { kBody, kMessage };  // of what follows a line
  struct Command {
    std::string_view name;
    bool (V2Session::*run)();
  };
  static constexpr size_t kLongestLine = 16384;  // as nsqd 1.3.0
  static constexpr int64_t kDefaultHeartbeat = 30 * kSecond;

  /// What IDENTIFY sets; times in nanoseconds.
  struct Settings {
    int64_t heartbeat = kDefaultHeartbeat;  // kNever: none
    int64_t msg_timeout = 0, output_buffer_size = 16384, output_buffer_timeout = 0, sample_rate = 0;
  };

  // ---- commands as such ------------------------------------------------------------------------------------------------

  /// Carries out the command at the front; 0 when it has to be tried again.
  size_t step(std::string_view input, bool final) {
    if (!magic_seen_) return take_magic(input);
    const size_t end = input.substr(0, kLongestLine).find('\n');
    if (end == input.npos) {
      if (input.size() >= kLongestLine) port.dropped = true;
      return 0;
    }
    split(input.substr(0, end));
    input_ = input;
    used_ = end + 1;
    final_ = final;
    again_ = false;
    needed_ = 0;
    dispatch();
    if (again_) return 0;
    last_command_ = broker_.now.steady;
    mpub_checked_ = 0;
    return used_;
  }

  size_t take_magic(std::string_view input) {
    const std::string_view magic = input.substr(0, 4);
    if (magic.size() < 4) return 0;
    if (magic == "  V2") {
      broker_.logger.say(Level::kInfo, "CLIENT(", info_.address, "): desired protocol magic '  V2'");
      magic_seen_ = true;
      last_command_ = broker_.now.steady;
      next_heartbeat_ = broker_.now.steady + kDefaultHeartbeat;
      set_timer();
    } else {
      broker_.logger.say(Level::kError, "client(", info_.address, ") bad protocol magic '", magic, "'");
      port.out.append_frame(1, "E_BAD_PROTOCOL");
      port.closing = true;
    }
    return 4;
  }

  void split(std::string_view line) {
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    size_t space = 0;
    for (words_ = 0; space != line.npos && words_ < word_.size(); ++words_) {
      space = line.find(' ');
      word_[words_] = line.substr(0, space);
      if (space != line.npos) line.remove_prefix(space + 1);
    }
  }

  bool dispatch() {
    static constexpr std::array<Command, 12> kCommands = {{
        {"FIN", &V2Session::fin}, {"PUB", &V2Session::pub}, {"RDY", &V2Session::rdy}, {"REQ", &V2Session::req},
        {"TOUCH", &V2Session::touch}, {"MPUB", &V2Session::mpub}, {"DPUB", &V2Session::dpub}, {"NOP", &V2Session::nop},
        {"SUB", &V2Session::sub}, {"CLS", &V2Session::cls}, {"IDENTIFY", &V2Session::identify}, {"AUTH", &V2Session::auth}}};
    for (const Command& command : kCommands)
      if (command.name == word_[0]) return (this->*command.run)();
    return fail("E_INVALID", text("invalid command ", word_[0]));
  }

  bool respond(std::string_view data) {
    port.out.append_frame(0, data);
    port.attend();
    return true;
  }
  /// An error that leaves the connection open.
  bool complain(std::string_view error, std::string_view cause = {}) {
    broker_.logger.say(Level::kError, "[", info_.address, "] - ", error, cause.empty() ? "" : " - ", cause);
    port.out.append_frame(1, error);
    port.attend();
    return false;
  }
  bool fail(std::string_view code, std::string_view message, std::string_view cause = {}) {
    port.closing = true;
    return complain(text(code, " ", message), cause);
  }
  bool park() {
    again_ = true;
    return false;
  }

  // ---- steps that commands share ---------------------------------------------------------------------------------------

  bool allowed(bool in_this_state) { return in_this_state || fail("E_INVALID", text("cannot ", word_[0], " in current state")); }
  bool has_words(size_t needed, std::string_view noun) {
    return words_ >= needed || fail("E_INVALID", text(word_[0], " insufficient number of ", noun));
  }
  /// The command has its parameters, and the first of them is the name of a topic.
  bool names_topic(size_t needed, std::string_view prefix = {}) {
    if (!has_words(needed, "parameters")) return false;
    return valid_name(word_[1]) || fail("E_BAD_TOPIC", text(prefix, word_[0], " topic name ", quoted(word_[1]), " is not valid"));
  }
  /// A decimal parameter: digits only, nothing is 0, and what does not fit wraps, as in nsqd 1.3.0.
  bool take_decimal(std::string_view digits, std::string_view what, uint64_t& number) {
    number = 0;
    for (char c : digits) {
      if (c < '0' || c > '9') return fail("E_INVALID", text(word_[0], " could not parse ", what, " ", digits));
      number = number * 10 + static_cast<uint64_t>(c - '0');
    }
    return true;
  }
  bool take_id(size_t needed, MessageId& id) {
    if (!allowed(state_ != State::kInit) || !has_words(needed, "params")) return false;
    if (word_[1].size() != 16) return fail("E_INVALID", "invalid message ID");
    id = MessageId::from(word_[1].data());
    return true;
  }
  /// What became of a message in flight.
  bool settle(std::string_view why) {
    return why.empty() || complain(text("E_", word_[0], "_FAILED ", word_[0], " ", word_[1], " failed ", why));
  }

  /// Something is not there: wait for that many bytes more, or say so when nothing will come any more.
  bool missing(std::string_view code, std::string_view message, size_t bytes) {
    if (final_) return fail(code, message);
    needed_ = used_ + bytes;
    again_ = true;
    return false;
  }
  std::optional<int32_t> take_number() {
    if (input_.size() - used_ < 4) return std::nullopt;
    used_ += 4;
    return static_cast<int32_t>(get_be<uint32_t>(input_.data() + used_ - 4));
  }
  /// The size of a part; `which` is for the errors of an MPUB's messages.
  bool take_size(Part part, size_t& size, std::optional<size_t> which = {}) {
    const bool body = part == Part::kBody;
    const int64_t most = body ? broker_.options.max_body_size : broker_.options.max_msg_size;
    const auto given = take_number();
    size = static_cast<size_t>(given.value_or(0));
    if (given && *given > 0 && *given <= most) return true;
    const std::string_view code = body ? "E_BAD_BODY" : "E_BAD_MESSAGE";
    const std::string noun = body ? "body" : which ? text("message(", *which, ") body") : "message body";
    if (!given) return missing(code, text(word_[0], " failed to read ", noun, " size"), 4);
    if (*given <= 0) return fail(code, text(word_[0], " invalid ", noun, " size ", *given));
    return fail(code, text(word_[0], body ? " body" : " message", " too big ", *given, " > ", most));
  }
  bool take_bytes(Part part, std::string_view& bytes, std::optional<size_t> which = {}) {
    size_t size = 0;
    if (!take_size(part, size, which)) return false;
    const bool body = part == Part::kBody;
    bytes = input_.substr(used_, size);
    if (bytes.size() < size)
      return missing(body ? "E_BAD_BODY" : "E_BAD_MESSAGE", text(word_[0], " failed to read ", body ? "body" : "message body"), size);
    used_ += size;
    return true;
  }

  /// Whether this client may do the command at hand; an empty channel means publishing.
  bool authorized(std::string_view channel) {
    if (broker_.options.auth_http_address.empty()) return true;
    if (!auth_done_) return fail("E_AUTH_FIRST", text("AUTH required before ", word_[0]));
    if (std::exchange(auth_failed_, false)) return fail("E_AUTH_FAILED", "AUTH failed");
    if (grant_->expires <= broker_.now.steady) {
      host_.ask_auth(*this);
      return park();
    }
    if (grant_->allows(std::string(word_[1]), std::string(channel))) return true;
    return fail("E_UNAUTHORIZED", text("AUTH failed for ", word_[0], " on ", quoted(word_[1]), " ", quoted(channel)));
  }
  /// The topic that the command names, made where it is missing. Nothing where this client may not, or has to wait: for the
  /// auth server, or for nsqlookupd, which is asked for the channels of a new topic.
  Topic* open_topic(std::string_view channel) {
    const std::string_view name = word_[1];
    if (!authorized(channel)) return nullptr;
    if (last_topic_ != nullptr && last_deletions_ == broker_.deletions && last_topic_->name == name) return last_topic_;
    if (broker_.find(name) == nullptr && host_.look_up(name, *this)) {
      park();
      return nullptr;
    }
    last_deletions_ = broker_.deletions;
    return last_topic_ = &broker_.topic(name);
  }

  // ---- IDENTIFY and AUTH -----------------------------------------------------------------------------------------------

  bool identify() {
    std::string_view body;
    if (!allowed(state_ == State::kInit) || !take_bytes(Part::kBody, body)) return false;
    JsonParser parser{body};
    const Json told = parser.parse();
    if (parser.error.empty() && !well_typed(told)) parser.error = "it or a member of it is of the wrong type";
    if (!parser.error.empty()) return fail("E_BAD_BODY", "IDENTIFY failed to decode JSON body", parser.error);
    info_.client_id = member_of(told, "client_id").string;
    info_.hostname = member_of(told, "hostname").string;
    info_.user_agent = member_of(told, "user_agent").string;
    info_.topology_region = member_of(told, "topology_region").string;
    info_.topology_zone = member_of(told, "topology_zone").string;
    if (!apply_settings(told)) return false;
    if (!std::exchange(identified_, true)) begin_delivery();
    set_timer();
    const int64_t beat = latest_.heartbeat == kNever ? -1 : latest_.heartbeat / kMillisecond;
    broker_.logger.say(Level::kInfo, "[", info_.address, "] IDENTIFY: {ClientID:", info_.client_id, " Hostname:", info_.hostname,
                       " UserAgent:", info_.user_agent, " HeartbeatInterval:", beat, " MsgTimeout:", latest_.msg_timeout / kMillisecond,
                       "}");
    return respond(member_of(told, "feature_negotiation").boolean ? identity_response() : "OK");
  }
  bool apply_settings(const Json& told) {
    const Options& limits = broker_.options;
    auto ms = [](Duration bound) { return bound.count() / kMillisecond; };
    const bool good = set(latest_.heartbeat, told, "heartbeat_interval", 1000, ms(limits.max_heartbeat_interval), kMillisecond, kNever) &&
                      set(latest_.output_buffer_timeout, told, "output_buffer_timeout", ms(limits.min_output_buffer_timeout),
                          ms(limits.max_output_buffer_timeout), kMillisecond, 0) &&
                      set(latest_.output_buffer_size, told, "output_buffer_size", 64, limits.max_output_buffer_size, 1, 1) &&
                      set(latest_.sample_rate, told, "sample_rate", 0, 99, 1) &&
                      set(latest_.msg_timeout, told, "msg_timeout", 1000, ms(limits.max_msg_timeout), kMillisecond);
    if (member_of(told, "output_buffer_size").integer() == -1) latest_.output_buffer_timeout = 0;
    return good;
  }
  /// Changes one setting: -1 turns it off where it can be, 0 leaves it where that is not within its bounds.
  bool set(int64_t& setting, const Json& told, std::string key, int64_t least, int64_t most, int64_t unit,
           std::optional<int64_t> off = {}) {
    const int64_t given = member_of(told, key).integer().value_or(0);
    const bool turned_off = given == -1 && off, fits = given >= least && given <= most;
    if (turned_off) setting = *off;
    else if (fits) setting = given * unit;
    if (turned_off || fits || given == 0) return true;
    std::replace(key.begin(), key.end(), '_', ' ');
    return fail("E_BAD_BODY", text("IDENTIFY ", key, " (", given, ") is invalid"));
  }
  /// The delivery side keeps what the first IDENTIFY said.
  void begin_delivery() {
    const Options& options = broker_.options;
    first_ = latest_;
    next_heartbeat_ = saturating_add(broker_.now.steady, first_.heartbeat);
    if (!topology_aware(options)) return;
    info_.zone_local = info_.topology_zone == options.topology_zone;
    info_.region_local = info_.topology_region == options.topology_region;
  }

  std::string identity_response() const {
    const Options& options = broker_.options;
    JsonWriter json;
    json.open('{').member("max_rdy_count", options.max_rdy_count).member("version", kProtocolVersion);
    json.member("max_msg_timeout", options.max_msg_timeout.count() / kMillisecond);
    json.member("msg_timeout", latest_.msg_timeout / kMillisecond);
    json.member("tls_v1", false).member("deflate", false).member("deflate_level", std::min<int64_t>(6, options.max_deflate_level));
    json.member("max_deflate_level", options.max_deflate_level).member("snappy", false).member("sample_rate", latest_.sample_rate);
    json.member("auth_required", !options.auth_http_address.empty()).member("output_buffer_size", latest_.output_buffer_size);
    json.member("output_buffer_timeout", latest_.output_buffer_timeout / kMillisecond);
    json.member("topology_region", options.topology_region).member("topology_zone", options.topology_zone).close('}');
    return json.out;
  }

  bool auth() {
    std::string_view secret;
    if (!allowed(state_ == State::kInit)) return false;
    if (words_ != 1) return fail("E_INVALID", "AUTH invalid number of parameters");
    if (!take_bytes(Part::kBody, secret)) return false;
    if (auth_done_) return fail("E_INVALID", "AUTH already set");
    if (broker_.options.auth_http_address.empty()) return fail("E_AUTH_DISABLED", "AUTH disabled");
    if (std::exchange(auth_failed_, false)) return fail("E_AUTH_FAILED", "AUTH failed");
    if (grant_ == nullptr) {
      secret_ = secret;
      host_.ask_auth(*this);
      return park();
    }
    if (grant_->authorizations.empty()) return fail("E_UNAUTHORIZED", "AUTH no authorizations found");
    auth_done_ = true;
    JsonWriter json;
    json.open('{').member("identity", grant_->identity).member("identity_url", grant_->identity_url);
    return respond(json.member("permission_count", static_cast<uint64_t>(grant_->authorizations.size())).close('}').out);
  }

  // ---- consuming -------------------------------------------------------------------------------------------------------

  bool sub() {
    const int64_t most = broker_.options.max_channel_consumers;
    if (!allowed(state_ == State::kInit)) return false;
    if (latest_.heartbeat == kNever) return fail("E_INVALID", "cannot SUB with heartbeats disabled");
    if (!names_topic(3)) return false;
    if (!valid_name(word_[2])) return fail("E_BAD_CHANNEL", text("SUB channel name ", quoted(word_[2]), " is not valid"));
    Topic* topic = open_topic(word_[2]);
    if (topic == nullptr) return false;
    Status status;
    Channel* channel = topic->channel(word_[2], status);
    if (channel == nullptr) return fail("E_SUB_FAILED", text("SUB failed ", status.error));
    if (most > 0 && static_cast<int64_t>(channel->consumers.size()) >= most)
      return fail("E_SUB_FAILED", text("SUB failed consumers for ", word_[1], ":", word_[2], " exceeds limit of ", most));
    channel->subscribe(port, info_, to_duration(first_.msg_timeout), static_cast<int>(first_.sample_rate));
    state_ = State::kSubscribed;
    return respond("OK");
  }

  bool rdy() {
    uint64_t number = 1;
    if (state_ == State::kClosing) return true;
    if (!allowed(state_ == State::kSubscribed) || (words_ > 1 && !take_decimal(word_[1], "count", number))) return false;
    const auto count = static_cast<int64_t>(number);
    const int64_t most = broker_.options.max_rdy_count;
    if (count < 0 || count > most) return fail("E_INVALID", text("RDY count ", count, " out of range 0-", most));
    if (port.consumer != nullptr) port.consumer->channel.set_ready(*port.consumer, count);
    return true;
  }

  bool fin() {
    MessageId id{};
    if (!take_id(2, id) || port.consumer == nullptr) return false;
    return settle(port.consumer->channel.finish(*port.consumer, id));
  }
  bool touch() {
    MessageId id{};
    if (!take_id(2, id) || port.consumer == nullptr) return false;
    return settle(port.consumer->channel.touch(*port.consumer, id, latest_.msg_timeout));
  }
  bool req() {
    MessageId id{};
    uint64_t ms = 0;
    if (!take_id(3, id) || !take_decimal(word_[2], "timeout", ms) || port.consumer == nullptr) return false;
    const int64_t most = broker_.options.max_req_timeout.count();
    const auto asked = static_cast<int64_t>(ms * static_cast<uint64_t>(kMillisecond));  // beyond 292 years it wraps, and may mean now
    const int64_t delay = std::clamp<int64_t>(asked, 0, most);
    if (delay != asked)
      broker_.logger.say(Level::kInfo, "[", info_.address, "] REQ timeout ", asked, " out of range 0-", most, ". Setting to ", delay);
    return settle(port.consumer->channel.requeue(*port.consumer, id, delay));
  }

  bool cls() {
    if (!allowed(state_ == State::kSubscribed)) return false;
    if (port.consumer != nullptr) port.consumer->channel.set_ready(*port.consumer, 0);
    state_ = State::kClosing;
    return respond("CLOSE_WAIT");
  }
  bool nop() { return true; }

  // ---- publishing ------------------------------------------------------------------------------------------------------

  bool pub() { return names_topic(2) && publish_one(0); }

  bool dpub() {
    uint64_t ms = 0;
    if (!names_topic(3) || !take_decimal(word_[2], "timeout", ms)) return false;
    const int64_t most = broker_.options.max_req_timeout.count() / kMillisecond;
    if (ms > static_cast<uint64_t>(most)) return fail("E_INVALID", text("DPUB timeout ", ms, " out of range 0-", most));
    return publish_one(static_cast<int64_t>(ms) * kMillisecond);
  }

  bool publish_one(int64_t delay) {
    std::string_view body;
    if (!take_bytes(Part::kMessage, body)) return false;
    Topic* topic = open_topic({});
    return topic != nullptr && store(*topic, &body, 1, delay);
  }

  bool mpub() {
    if (!names_topic(2, "E_BAD_TOPIC ")) return false;
    Topic* topic = open_topic({});
    std::vector<std::string_view> bodies;
    return topic != nullptr && take_bodies(bodies) && store(*topic, bodies.data(), bodies.size(), 0);
  }
  /// Looks at all messages before any is stored. What was found good is not looked at again when more has arrived.
  bool take_bodies(std::vector<std::string_view>& bodies) {
    size_t unused = 0;
    if (!take_size(Part::kBody, unused)) return false;
    const auto count = take_number();
    if (!count) return missing("E_BAD_BODY", "MPUB failed to read message count", 4);
    if (*count <= 0 || *count > (broker_.options.max_body_size - 4) / 5)
      return fail("E_BAD_BODY", text("MPUB invalid message count ", *count));
    size_t at = used_;
    if (mpub_checked_ > 0) used_ = mpub_end_;
    for (std::string_view body; mpub_checked_ < static_cast<size_t>(*count); ++mpub_checked_, mpub_end_ = used_)
      if (!take_bytes(Part::kMessage, body, mpub_checked_)) return false;
    bodies.reserve(mpub_checked_);
    for (; at < used_; at += 4 + bodies.back().size()) bodies.push_back(input_.substr(at + 4, get_be<uint32_t>(input_.data() + at)));
    return true;
  }

  bool store(Topic& topic, const std::string_view* bodies, size_t count, int64_t delay) {
    const Status status = topic.publish(bodies, count, delay);
    if (!status.ok()) return fail(text("E_", word_[0], "_FAILED"), text(word_[0], " failed ", status.error));
    if (published_.empty() || published_.back().first != topic.name) {  // the latest one is the last one
      auto found = std::find_if(published_.begin(), published_.end(), [&](const auto& entry) { return entry.first == topic.name; });
      if (found == published_.end()) published_.emplace_back(topic.name, 0);
      else std::swap(*found, published_.back());
    }
    published_.back().second += count;
    return respond("OK");
  }

  // ---- time ------------------------------------------------------------------------------------------------------------

  int64_t read_deadline() const {
    const int64_t interval = magic_seen_ ? latest_.heartbeat : kDefaultHeartbeat;
    return saturating_add(last_command_, saturating_add(interval, interval));
  }
  /// One timer for the heartbeat and the read deadline.
  void set_timer() {
    int64_t beat = next_heartbeat_;
    if (beat != kNever) {  // rounded up, so that the heartbeats of many clients share a turn of the loop
      const int64_t grain = first_.heartbeat < 8 * kSecond ? kSecond / 4 : kSecond;
      beat = (beat + grain - 1) / grain * grain;
    }
    timer_.set(std::min(beat, read_deadline()));
  }
  void on_timer() {
    const int64_t now = broker_.now.steady;
    if (parked) last_command_ = now;  // it is not the client who is waited for
    if (now >= read_deadline()) {
      broker_.logger.say(Level::kError, "client(", info_.address, ") - i/o timeout");
      late = true;
      return port.attend();
    }
    if (now >= next_heartbeat_) {
      const bool stuck = !port.out.empty() && written == written_at_heartbeat_;
      written_at_heartbeat_ = written;
      next_heartbeat_ = std::max(next_heartbeat_ + first_.heartbeat, now);
      if (stuck) port.dropped = true;  // the write deadline: nothing went out for a whole interval
      else respond("_heartbeat_");
      port.attend();
    }
    set_timer();
  }

  Host& host_;
  Broker& broker_;
  std::string ip_;
  Now connected_at_;
  int64_t last_command_;  // when it was done with
  int64_t next_heartbeat_ = kNever;
  uint64_t written_at_heartbeat_ = std::numeric_limits<uint64_t>::max();  // a value that `written` never has
  State state_ = State::kInit;
  bool magic_seen_ = false, identified_ = false;
  ClientInfo info_;
  Settings latest_;  // as the last IDENTIFY set them: for the read deadline, TOUCH, and what is shown
  Settings first_;   // as the first one did: for the heartbeats and the delivery
  std::vector<std::pair<std::string, uint64_t>> published_;
  std::string secret_;
  std::shared_ptr<const AuthGrant> grant_;
  bool auth_failed_ = false, auth_done_ = false;

  // The command at hand.
  std::string_view input_;  // from the command's line on
  size_t used_ = 0;         // of it
  std::array<std::string_view, 4> word_;
  size_t words_ = 0;
  bool final_ = false;      // no more will come
  bool again_ = false;      // it is to be tried again: when `needed_` bytes are there, or when it is no longer parked
  size_t needed_ = 0;
  size_t mpub_checked_ = 0, mpub_end_ = 0;  // how many messages of a half-arrived MPUB were looked at, and where they end

  Topic* last_topic_ = nullptr;  // that was opened
  uint64_t last_deletions_ = 0;
  Timer timer_;
};

// ---------------------------------------------------------------------------------------------------------------------
// [10] Statistics
//
// One snapshot, and the ways to print it: JSON and text as GET /stats has them, and lines for statsd.
// ---------------------------------------------------------------------------------------------------------------------

struct StatsQuery {
  std::string topic, channel;  // empty: all
  bool include_clients = true, include_memory = true;
};

inline ChannelStats channel_stats(const Channel& channel, bool include_clients, LatencySketch& merged) {
  const Broker& broker = channel.topic.broker;
  ChannelStats shown{channel.name, channel.depth(), channel.backend_depth(), channel.in_flight_count(), channel.deferred_count(),
                     channel.message_count(), channel.requeue_count, channel.timeout_count, channel.zone_local_count,
                     channel.region_local_count, channel.global_count, static_cast<int64_t>(channel.consumers.size()),
                     {}, channel.paused, {}};
  if (include_clients)
    for (const auto& consumer : channel.consumers) shown.clients.push_back(consumer->port->session->stats());
  if (channel.latency != nullptr) {
    shown.latency = channel.latency->stats(broker.options.e2e_processing_latency_percentile, broker.now.steady);
    merged.merge(*channel.latency, broker.now.steady);
  }
  return shown;
}

inline TopicStats topic_stats(const Topic& topic, const StatsQuery& query) {
  const Broker& broker = topic.broker;
  TopicStats shown{topic.name, topic.depth(), topic.backend_depth(), topic.message_count, topic.message_bytes, topic.paused, {}, {}};
  LatencySketch merged(broker.options.e2e_processing_latency_window_time.count());
  for (const auto& [name, channel] : topic.channels)
    if (query.channel.empty() || query.channel == name) shown.channels.push_back(channel_stats(*channel, query.include_clients, merged));
  if (!shown.channels.empty()) shown.latency = merged.stats(broker.options.e2e_processing_latency_percentile, broker.now.steady);
  return shown;
}

inline Stats take_stats(const Host& host, const StatsQuery& query) {
  Stats stats;
  stats.health = host.broker.storage.health();
  stats.start_time = host.started_wall / kSecond;
  for (const auto& [name, topic] : host.broker.topics) {
    const bool wanted = (query.topic.empty() || query.topic == name) && (query.channel.empty() || topic->find(query.channel) != nullptr);
    if (wanted) stats.topics.push_back(topic_stats(*topic, query));
  }
  if (query.include_clients)
    host.each_client([&](const V2Session& client) {
      if (client.publishes()) stats.producers.push_back(client.stats());
    });
  return stats;
}

/// nsqd's names for Go's memory figures. Here: what the process holds in memory of its own; 0 for what only a collector has.
inline std::vector<std::pair<std::string, int64_t>> memory_figures() {
  int64_t in_use = 0;
  if (std::FILE* statm = std::fopen("/proc/self/statm", "r")) {
    long long total = 0, resident = 0, shared = 0;
    if (std::fscanf(statm, "%lld %lld %lld", &total, &resident, &shared) == 3) in_use = (resident - shared) * ::sysconf(_SC_PAGESIZE);
    std::fclose(statm);
  }
  return {{"heap_objects", 0},      {"heap_idle_bytes", 0},  {"heap_in_use_bytes", in_use},
          {"heap_released_bytes", 0}, {"gc_pause_usec_100", 0}, {"gc_pause_usec_99", 0},
          {"gc_pause_usec_95", 0},  {"next_gc_bytes", 0},    {"gc_total_runs", 0}};
}

/// A member that is a list, or null.
template <typename Items, typename Write>
void write_list(JsonWriter& json, std::string_view key, bool null, const Items& items, Write&& write) {
  if (null) return void(json.key(key).raw("null"));
  json.key(key).open('[');
  for (const auto& item : items) write(item);
  json.close(']');
}

inline void write_latency(JsonWriter& json, const LatencyStats& latency) {
  json.key("e2e_processing_latency").open('{').member("count", latency.count);
  write_list(json, "percentiles", latency.percentiles.empty(), latency.percentiles, [&json](const auto& entry) {
    json.open('{').member("quantile", entry.first).member("value", entry.second).close('}');
  });
  json.close('}');
}

inline void write_client(JsonWriter& json, const ClientStats& client, const StatsQuery& query) {
  json.open('{').member("client_id", client.client_id).member("hostname", client.hostname).member("version", "V2");
  json.member("remote_address", client.remote_address).member("state", client.state).member("ready_count", client.ready_count);
  json.member("in_flight_count", client.in_flight_count).member("message_count", client.message_count);
  json.member("finish_count", client.finish_count).member("requeue_count", client.requeue_count).member("connect_ts", client.connected_at);
  json.member("sample_rate", client.sample_rate).member("deflate", false).member("snappy", false).member("user_agent", client.user_agent);
  if (client.authed) json.member("authed", true);
  if (!client.auth_identity.empty()) json.member("auth_identity", client.auth_identity);
  if (!client.auth_identity_url.empty()) json.member("auth_identity_url", client.auth_identity_url);
  json.member("topology_zone", client.topology_zone).member("topology_region", client.topology_region);
  auto counts = client.pub_counts;
  const auto hidden = [&](const auto& entry) { return !query.topic.empty() && query.topic != entry.first; };
  counts.erase(std::remove_if(counts.begin(), counts.end(), hidden), counts.end());
  if (!counts.empty())
    write_list(json, "pub_counts", false, counts, [&json](const auto& entry) {
      json.open('{').member("topic", entry.first).member("count", entry.second).close('}');
    });
  json.member("tls", false).member("tls_cipher_suite", "").member("tls_version", "").member("tls_negotiated_protocol", "");
  json.member("tls_negotiated_protocol_is_mutual", false).close('}');
}

inline void write_channel(JsonWriter& json, const ChannelStats& channel, const StatsQuery& query) {
  json.open('{').member("channel_name", channel.name).member("depth", channel.depth).member("backend_depth", channel.backend_depth);
  json.member("in_flight_count", channel.in_flight_count).member("deferred_count", channel.deferred_count);
  json.member("message_count", channel.message_count);
  if (channel.zone_local_count > 0) json.member("zone_local_msg_count", channel.zone_local_count);
  if (channel.region_local_count > 0) json.member("region_local_msg_count", channel.region_local_count);
  if (channel.global_count > 0) json.member("global_msg_count", channel.global_count);
  json.member("requeue_count", channel.requeue_count).member("timeout_count", channel.timeout_count);
  json.member("client_count", channel.client_count);
  const auto write = [&](const ClientStats& client) { write_client(json, client, query); };
  write_list(json, "clients", !query.include_clients, channel.clients, write);
  json.member("paused", channel.paused);
  write_latency(json, channel.latency);
  json.close('}');
}

inline void write_topic(JsonWriter& json, const TopicStats& topic, const StatsQuery& query) {
  json.open('{').member("topic_name", topic.name);
  write_list(json, "channels", false, topic.channels, [&](const ChannelStats& channel) { write_channel(json, channel, query); });
  json.member("depth", topic.depth).member("backend_depth", topic.backend_depth).member("message_count", topic.message_count);
  json.member("message_bytes", topic.message_bytes).member("paused", topic.paused);
  write_latency(json, topic.latency);
  json.close('}');
}

inline std::string stats_json(const Stats& stats, const StatsQuery& query, bool topic_known) {
  JsonWriter json;
  json.open('{').member("version", kProtocolVersion).member("health", stats.health).member("start_time", stats.start_time);
  write_list(json, "topics", !topic_known, stats.topics, [&](const TopicStats& topic) { write_topic(json, topic, query); });
  if (query.include_memory) {
    json.key("memory").open('{');
    for (const auto& [name, figure] : memory_figures()) json.member(name, figure);
    json.close('}');
  }
  const auto write = [&](const ClientStats& client) { write_client(json, client, query); };
  write_list(json, "producers", stats.producers.empty(), stats.producers, write);
  return json.close('}').out;
}

inline std::string build_text() {
#if defined(__clang__)
  const std::string compiler = text("clang++ ", __clang_major__, ".", __clang_minor__);
#else
  const std::string compiler = text("g++ ", __GNUC__, ".", __GNUC_MINOR__);
#endif
  return text("nsqd v", kProtocolVersion, " (nsqd.hpp ", kVersion, ", built w/", compiler, ")");
}

inline std::string time_text(const char* format, const tm& time) {
  std::array<char, 48> shown{};
  return std::string(shown.data(), std::strftime(shown.data(), shown.size(), format, &time));
}

/// A label and its value, the value filled up to a width.
template <typename Value>
std::string column(std::string_view label, const Value& value, size_t width) {
  const std::string shown = text(value);
  return text(label, shown, std::string(width - std::min(width, shown.size()), ' '));
}

inline std::string latency_text(const LatencyStats& latency) {
  using Unit = std::pair<int64_t, std::string_view>;
  static constexpr std::array<Unit, 4> kUnits = {{{kSecond, "s"}, {kMillisecond, "ms"}, {kMicrosecond, "us"}, {1, "ns"}}};
  std::string shown;
  for (const auto& [quantile, value] : latency.percentiles) {
    const auto unit = *std::find_if(kUnits.begin(), kUnits.end() - 1, [v = value](const auto& u) { return v > u.first; });
    std::array<char, 40> number{};
    std::snprintf(number.data(), number.size(), "%.1f", static_cast<double>(value) / static_cast<double>(unit.first));
    shown += text(shown.empty() ? "" : ", ", number.data(), unit.second);
  }
  return shown;
}

inline std::string client_text(const ClientStats& client) {
  const size_t colon = client.remote_address.rfind(':');
  const std::string port = colon == std::string::npos ? "" : client.remote_address.substr(colon + 1);
  const std::string name = text(client.hostname, ":", port, client.user_agent.empty() ? "" : " ", client.user_agent);
  std::string shown = column("[V2 ", name, 21) + "]";
  uint64_t total = 0;
  std::string topics;
  for (const auto& [topic, count] : client.pub_counts) {
    total += count;
    topics += text(topics.empty() ? "" : ",", topic, "=", count);
  }
  if (!topics.empty())
    shown += text(column(" msgs: ", total, 8), " topics: ", topics);
  else
    shown += text(" state: ", client.state, column(" inflt: ", client.in_flight_count, 4), column(" rdy: ", client.ready_count, 4),
                  column(" fin: ", client.finish_count, 8), column(" re-q: ", client.requeue_count, 8),
                  column(" msgs: ", client.message_count, 8));
  return text(shown, " connected: ", duration_text(client.connected_for / kSecond * kSecond), "\n");
}

inline std::string channel_text(const ChannelStats& channel) {
  std::string out = text(channel.paused ? "   *P " : "      ", column("[", channel.name, 25), column("] depth: ", channel.depth, 5),
                         column(" be-depth: ", channel.backend_depth, 5), column(" inflt: ", channel.in_flight_count, 4),
                         column(" def: ", channel.deferred_count, 4), column(" re-q: ", channel.requeue_count, 5),
                         column(" timeout: ", channel.timeout_count, 5), column(" msgs: ", channel.message_count, 8),
                         " e2e%: ", latency_text(channel.latency), "\n");
  for (const ClientStats& client : channel.clients) out += "        " + client_text(client);
  return out;
}

inline std::string stats_text(const Stats& stats, const StatsQuery& query, const Now& now, int64_t started_wall) {
  const time_t started = static_cast<time_t>(stats.start_time);
  tm local{};
  std::string start = time_text("%Y-%m-%dT%H:%M:%S%z", *::localtime_r(&started, &local));
  if (ends_with(start, "+0000")) start.replace(start.size() - 5, 5, "Z");
  else start.insert(start.size() - 2, ":");
  const std::string uptime = duration_text(std::max<int64_t>(0, now.wall - started_wall));
  std::string out = text(build_text(), "\nstart_time ", start, "\nuptime ", uptime, "\n\nHealth: ", stats.health, "\n");
  if (query.include_memory) {
    out += "\nMemory:\n";
    for (const auto& [name, figure] : memory_figures()) out += text(column("   ", name, 25), "\t", figure, "\n");
  }
  out += stats.topics.empty() ? "\nTopics: None\n" : "\nTopics:";
  for (const TopicStats& topic : stats.topics) {
    out += text("\n", topic.paused ? "*P " : "   ", column("[", topic.name, 15), column("] depth: ", topic.depth, 5),
                column(" be-depth: ", topic.backend_depth, 5), column(" msgs: ", topic.message_count, 8),
                " e2e%: ", latency_text(topic.latency), "\n");
    for (const ChannelStats& channel : topic.channels) out += channel_text(channel);
  }
  out += stats.producers.empty() ? "\nProducers: None\n" : "\nProducers:\n";
  for (const ClientStats& client : stats.producers) out += "   " + client_text(client);
  return out;
}

/// The metrics of one push, and what the next one has to subtract.
class StatsdFeed {
 public:
  /// Packets of whole lines, none longer than the options have it unless a single line is.
  std::vector<std::string> packets(const Stats& stats, const Options& options, const std::string& prefix) {
    lines_.clear();
    prefix_ = prefix;
    const auto hidden = [&](const std::string& name) { return options.statsd_exclude_ephemeral && is_ephemeral(name); };
    for (const TopicStats& topic : stats.topics) {
      if (hidden(topic.name)) continue;
      const std::string of = text("topic.", topic.name, ".");
      counters(of, {{"message_count", topic.message_count}, {"message_bytes", topic.message_bytes}});
      gauges(of, {{"depth", topic.depth}, {"backend_depth", topic.backend_depth}}, topic.latency);
      for (const ChannelStats& channel : topic.channels)
        if (!hidden(channel.name)) add_channel(text(of, "channel.", channel.name, "."), channel);
    }
    if (options.statsd_mem_stats) {
      auto figures = memory_figures();
      figures.pop_back();  // gc_total_runs, which is a counter
      gauges("mem.", figures, {});
      counters("mem.", {{"gc_runs", 0}});
    }
    last_ = std::exchange(counted_, {});
    return packed(static_cast<size_t>(std::max<int64_t>(options.statsd_udp_packet_size, 1)));
  }

 private:
  void add_channel(const std::string& of, const ChannelStats& channel) {
    counters(of, {{"message_count", channel.message_count}, {"requeue_count", channel.requeue_count},
                  {"timeout_count", channel.timeout_count}});
    gauges(of, {{"depth", channel.depth}, {"backend_depth", channel.backend_depth}, {"in_flight_count", channel.in_flight_count},
                {"deferred_count", channel.deferred_count}, {"clients", channel.client_count}}, channel.latency);
  }

  void counters(const std::string& of, const std::vector<std::pair<std::string, uint64_t>>& values) {
    for (const auto& [name, value] : values) {
      counted_[of + name] = value;
      lines_.push_back(text(prefix_, of, name, ":", static_cast<int64_t>(value - last_[of + name]), "|c\n"));
    }
  }

  void gauges(const std::string& of, const std::vector<std::pair<std::string, int64_t>>& values, const LatencyStats& latency) {
    for (const auto& [name, value] : values) lines_.push_back(text(prefix_, of, name, ":", value, "|g\n"));
    for (const auto& [quantile, value] : latency.percentiles)
      lines_.push_back(text(prefix_, of, "e2e_processing_latency_", static_cast<int64_t>(std::lround(quantile * 100)), ":", value, "|g\n"));
  }

  std::vector<std::string> packed(size_t packet_size) const {
    std::vector<std::string> packets;
    for (const std::string& line : lines_) {
      if (packets.empty() || packets.back().size() + line.size() > packet_size) packets.emplace_back();
      packets.back() += line;
    }
    return packets;
  }

  std::string prefix_;
  std::vector<std::string> lines_;
  std::map<std::string, uint64_t> last_, counted_;
};

/// The metrics of GET /metrics, in the text format of Prometheus.
class MetricsText {
 public:
  static std::string of(const Stats& stats, size_t connections) {
    MetricsText text;
    text.one("nsqd_info", "gauge", "the daemon that answers", 1, detail::text("{version=\"", kVersion, "\",protocol_version=\"", kProtocolVersion, "\"}"));
    text.one("nsqd_healthy", "gauge", "1, or 0 when the disk fails", stats.health == "OK" ? 1 : 0);
    text.one("nsqd_connections", "gauge", "open connections of all kinds", static_cast<double>(connections));
    text.per(stats, "nsqd_topic_messages_total", "messages published to the topic", [](const TopicStats& t) { return t.message_count; });
    text.per(stats, "nsqd_topic_message_bytes_total", "bytes of their bodies", [](const TopicStats& t) { return t.message_bytes; });
    text.per(stats, "nsqd_topic_depth", "messages not handed to a channel yet", [](const TopicStats& t) { return t.depth; });
    text.per(stats, "nsqd_topic_paused", "1 when the topic is paused", [](const TopicStats& t) { return t.paused; });
    text.per(stats, "nsqd_channel_messages_total", "messages that the channel was given", [](const ChannelStats& c) { return c.message_count; });
    text.per(stats, "nsqd_channel_requeued_total", "messages that consumers gave back", [](const ChannelStats& c) { return c.requeue_count; });
    text.per(stats, "nsqd_channel_timed_out_total", "messages whose time ran out", [](const ChannelStats& c) { return c.timeout_count; });
    text.per(stats, "nsqd_channel_depth", "messages that wait", [](const ChannelStats& c) { return c.depth; });
    text.per(stats, "nsqd_channel_in_flight", "messages with a consumer", [](const ChannelStats& c) { return c.in_flight_count; });
    text.per(stats, "nsqd_channel_deferred", "messages put off", [](const ChannelStats& c) { return c.deferred_count; });
    text.per(stats, "nsqd_channel_clients", "consumers", [](const ChannelStats& c) { return c.client_count; });
    text.per(stats, "nsqd_channel_paused", "1 when the channel is paused", [](const ChannelStats& c) { return c.paused; });
    if (std::any_of(stats.topics.begin(), stats.topics.end(), [](const TopicStats& t) { return !t.latency.percentiles.empty(); })) text.latency(stats);
    text.process(stats);
    return std::move(text.out_);
  }

 private:
  void head(std::string_view name, std::string_view type, std::string_view help) { out_ += text("# HELP ", name, " ", help, "\n# TYPE ", name, " ", type, "\n"); }
  void one(std::string_view name, std::string_view type, std::string_view help, double value, std::string_view labels = {}) {
    head(name, type, help);
    line(name, labels, value);
  }
  void line(std::string_view name, std::string_view labels, double value) {
    std::array<char, 40> number{};
    std::snprintf(number.data(), number.size(), "%.15g", value);
    out_ += text(name, labels, " ", number.data(), "\n");
  }
  /// One line for each topic or, where the figure is a channel's, for each channel. Names need no escapes: see valid_name.
  template <typename Figure>
  void per(const Stats& stats, std::string_view name, std::string_view help, Figure&& figure) {
    head(name, ends_with(name, "_total") ? "counter" : "gauge", help);
    for (const TopicStats& topic : stats.topics) {
      if constexpr (std::is_invocable_v<Figure, const TopicStats&>) {
        line(name, text("{topic=\"", topic.name, "\"}"), static_cast<double>(figure(topic)));
      } else {
        for (const ChannelStats& channel : topic.channels) line(name, labels(topic, channel), static_cast<double>(figure(channel)));
      }
    }
  }
  static std::string labels(const TopicStats& topic, const ChannelStats& channel, std::string_view more = {}) {
    return text("{topic=\"", topic.name, "\",channel=\"", channel.name, "\"", more, "}");
  }
  void latency(const Stats& stats) {
    head("nsqd_channel_latency_seconds", "summary", "time from publish to finish, by quantile, over the window");
    for (const TopicStats& topic : stats.topics)
      for (const ChannelStats& channel : topic.channels)
        for (const auto& [quantile, value] : channel.latency.percentiles)
          line("nsqd_channel_latency_seconds", labels(topic, channel, text(",quantile=\"", JsonWriter().value(quantile).out, "\"")), static_cast<double>(value) / 1e9);
  }
  void process(const Stats& stats) {
    rusage used{};
    ::getrusage(RUSAGE_SELF, &used);
    const auto seconds = [](const timeval& time) { return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) / 1e6; };
    one("process_cpu_seconds_total", "counter", "time that the process has used a processor", seconds(used.ru_utime) + seconds(used.ru_stime));
    one("process_start_time_seconds", "gauge", "when the process started, Unix time", static_cast<double>(stats.start_time));
    one("process_memory_in_use_bytes", "gauge", "memory of the process's own", static_cast<double>(memory_figures()[2].second));
  }
  std::string out_;
};

// ---------------------------------------------------------------------------------------------------------------------
// [11] The page
//
// What a browser gets at GET /: one self-contained page that shows the statistics and calls the HTTP API.
// ---------------------------------------------------------------------------------------------------------------------

/// What the page may do: run its own script and style, and speak to this daemon, nothing else.
inline constexpr std::string_view kPagePolicy =
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'";

inline constexpr std::string_view kPage = R"page(<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>nsqd</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --page: light-dark(#f6f7f7, #131618); --card: light-dark(#fff, #1b1f22);
  --ink: light-dark(#1c2326, #e4e8e9); --soft: light-dark(#5c676c, #98a4a9); --faint: light-dark(#a3adb1, #5f6b71);
  --line: light-dark(#e3e7e8, #2b3135); --accent: light-dark(#0b7468, #4fc4b3); --warn: light-dark(#96590a, #e5b567);
  --bad: light-dark(#b3261e, #f2938c); font: 14px/1.45 system-ui, sans-serif; color: var(--ink);
  background: var(--page) } * { box-sizing: border-box } [hidden], #toast:empty { display: none !important } code {
  font-family: ui-monospace, monospace } body { max-width: 1320px; margin: 0 auto; padding: 8px 24px 72px;
  overflow-wrap: anywhere } .bar > input { flex: 1 } header, .bar, dl { display: flex; flex-wrap: wrap;
  align-items: baseline; gap: 8px; margin: 14px 0; color: var(--soft) } header { column-gap: 18px } h1, h2 {
  font-size: 20px; margin: 0; color: var(--ink) } #what, .topic .name { font-weight: 600 } dl { column-gap: 32px }
dt, thead, td::before { color: var(--soft); font-size: 12px } dd, .n, li { font-variant: tabular-nums } dd {
  margin: 0; font-size: 20px; color: var(--ink) } output { flex: 1 } dialog .bar { justify-content: end;
  margin-bottom: 0 } button, input, textarea { font: inherit; color: var(--ink); background: var(--card);
  border: 1px solid var(--line); border-radius: 7px; padding: 6px 12px } button { cursor: pointer } button:hover {
  border-color: var(--faint) } .bar .main { background: var(--accent); color: var(--card); font-weight: 600 }
.bar #yes { background: var(--bad) } :focus-visible { outline: 2px solid var(--accent); outline-offset: 1px }
fieldset { border: 0; padding: 0; margin: 0 } table, .note, dialog { border: 1px solid var(--line);
  border-radius: 10px; background: var(--card); color: var(--ink) } table { width: 100%; table-layout: fixed;
  border-spacing: 0 } th, td { padding: 5px; text-align: left; font-weight: 400 } .n, .do { text-align: right;
  width: 69px } .message_count { width: 86px } .plot { width: 128px } .do { width: 178px } thead th { position: sticky;
  top: 0; background: var(--card); border-radius: 10px; padding-block: 9px; white-space: nowrap } th:first-child {
  padding-left: 16px } .topic tr > * { border-top: 1px solid var(--line); padding-top: 8px } td button, .open {
  border-color: transparent; background: none; color: var(--soft); padding: 3px 5px; font-size: 13px }
td button:hover, .open:hover { border-color: transparent; color: var(--ink); background: var(--page) } .zero {
  color: var(--faint) } .open { color: inherit; font-size: 14px; text-align: left } .open::before { content: "+";
  display: inline-block; width: 16px } .open[aria-expanded=true]::before { content: "\2212" }
td.timeout_count:not(.zero), .badge { color: var(--warn) } .badge { font-size: 12px; border: 1px solid;
  border-radius: 9px; padding: 0 7px } .good { color: var(--accent) } svg { display: block; width: 112px; height: 24px;
  color: var(--accent); border-bottom: 1px solid var(--line) } polyline { fill: none; stroke: currentColor;
  stroke-width: 1.5; vector-effect: non-scaling-stroke } .bad { color: var(--bad) } polygon { fill: currentColor;
  opacity: .14 } .flat > * { opacity: 0 } .gone :is(main, header) { opacity: .5 } ul { margin: 0 10px 8px 32px;
  padding: 8px 12px; border-radius: 7px; background: var(--page); list-style: none } .note { padding: 12px 16px }
#toast { position: fixed; inset: auto 16px 4px; margin-inline: auto; width: fit-content; background: var(--ink);
  color: var(--page) } dialog { width: min(440px, 92%); padding: 22px } label { display: block; color: var(--soft);
  margin: 12px 0 } label > * { display: block; width: 100%; margin-top: 3px } @media (max-width: 1200px) { body {
  padding-inline: 12px } thead, td:empty, td.zero:not(.depth) { display: none } table, tbody { display: block } tr {
  display: flex; flex-wrap: wrap; gap: 4px 16px; padding: 9px 14px } ul { margin: 0 } .topic:not(:nth-child(2)) {
  border-top: 1px solid var(--line) } tbody th { flex: 1 1 50% } dl { column-gap: 20px } tbody tr > * {
  border: 0 !important; padding: 0 !important; width: auto !important; text-align: left } td::before {
  content: attr(data-label) " " } .do, td:only-child { flex: 1 0 100% } .do { margin-left: -6px } }
</style>
<header><h1>nsqd</h1><span id="host"></span><span id="version"></span><span id="uptime"></span><span id="health"></span>
</header>
<p id="gone" class="note bad" role="alert" hidden></p>
<main><dl id="sums"></dl>
<div class="bar"><input id="filter" type="search" placeholder="Filter by name" aria-label="Filter by name">
<button data-do="create">Create</button><button data-do="publish" class="main">Publish</button></div>
<p id="empty" class="note" hidden>Nothing here yet: publish with <code id="try"></code></p>
<p id="none" class="note" hidden>No topic or channel has this in its name.</p>
<table id="list" hidden><thead><tr><th>Name<th class="plot">Depth, last minutes<th class="do"></thead></table></main>
<p id="toast" class="note" role="status"></p>
<template id="row"><tbody><tr><th scope="row"><span class="name t"></span><button class="open name c" data-do="open"
 aria-expanded="false"></button> <span class="badge" hidden>paused</span><td class="plot"><svg viewBox="0 0 100 24"
 role="img" preserveAspectRatio="none"><polygon /><polyline /></svg><td class="do"><button class="t"
 data-do="publish">Publish</button><button class="t" data-do="create">Channel</button><button data-do="pause"
>Pause</button><button data-do="empty">Empty</button><button data-do="delete">Delete</button></tbody></template>
<dialog id="confirm" aria-labelledby="verb"><form method="dialog"><h2 id="verb"></h2><p id="what"></p><p id="loss"></p>
<div class="bar"><button autofocus>Cancel</button><button value="yes" class="main" id="yes"></button></div></form>
</dialog>
<dialog id="form" aria-labelledby="title"><form><h2 id="title"></h2><datalist id="names"></datalist>
<label>Topic<input name="topic" list="names" required maxlength="64" pattern="[.a-zA-Z0-9_\-]+(#ephemeral)?"></label>
<fieldset id="create"><label>Channel (optional)
<input name="channel" maxlength="64" pattern="[.a-zA-Z0-9_\-]+(#ephemeral)?"></label></fieldset>
<fieldset id="publish"><label>Message<textarea name="body" rows="4" required></textarea></label>
<label>Delay in milliseconds (optional)<input name="defer" type="number" min="0"></label></fieldset>
<div class="bar"><output></output><button type="button" data-do="close">Close</button><button class="main"
 id="go"></button></div>
</form></dialog>
<script>
'use strict';
const COLUMNS = { depth: 'Depth', in_flight_count: 'In flight', deferred_count: 'Deferred', requeue_count: 'Requeued',
  timeout_count: 'Timed out', message_count: 'Messages', in: 'In/s', out: 'Out/s', client_count: 'Clients' };
const $ = id => document.getElementById(id), table = $('list'), rows = new Map(), opened = Date.now();
function make(tag, props, ...kids) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...kids);
  return node;
}
const set = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const count = n => n < 10 ? String(Math.round(n * 10) / 10) : Math.round(n).toLocaleString('en');
const age = s => s < 120 ? `${Math.max(0, s) | 0} s` : s < 7200 ? `${s / 60 | 0} min` : s < 172800 ? `${s / 3600 | 0} h`
  : `${s / 86400 | 0} days`;
const time = () => new Date().toLocaleTimeString();
let startTime, wake, quiet;

// Only rows on the screen are drawn, so 200 topics cost little more than 20.
const watch = new IntersectionObserver(list => {
  for (const { target: { row }, isIntersecting } of list) if ((row.seen = isIntersecting)) draw(row);
});
function addRow(topic, channel) {
  const body = $('row').content.firstElementChild.cloneNode(true), last = body.querySelector('.do');
  const kind = body.className = channel ? 'channel' : 'topic', keys = Object.keys(COLUMNS), cells = {};
  body.querySelectorAll(channel ? '.t' : '.c').forEach(e => e.remove());
  body.querySelector('.name').textContent = channel || topic;
  if (!channel) last.colSpan = keys.splice(7).length + 1;  // its buttons take the place of Out/s and Clients
  for (const key of keys) last.before(cells[key] = make('td', { className: `n ${key}` }));
  for (const key of keys) cells[key].dataset.label = COLUMNS[key];
  watch.observe(body);
  const title = channel ? `channel ${channel} of topic ${topic}` : `topic ${topic}`;
  return body.row = { body, topic, channel, kind, title, cells, past: [] };
}
function update(row, data, now) {
  // What left a channel was finished or emptied: all that arrived less what is still held.
  const held = row.held = data.depth + (data.in_flight_count || 0) + (data.deferred_count || 0), past = row.past;
  const arrived = data.message_count, left = arrived - held;
  if (past.at(-1)?.arrived > arrived)  // nsqd was restarted
    for (const p of past) Object.assign(p, { arrived, left });
  past.push({ at: now, depth: data.depth, arrived, left });
  while (past[0].at < now - 300e3) past.shift();
  const old = past.findLast(p => p.at < now - 5000) || past[0], rate = n => Math.max(0, n * 1000 / (now - old.at || 1));
  row.data = { ...data, in: rate(arrived - old.arrived), out: rate(left - old.left) };
  if (row.seen) draw(row);
}
function draw({ body, data, past, cells, title, list }) {
  const find = s => body.querySelector(s), high = Math.max(...past.map(p => p.depth)), now = past.at(-1).at;
  for (const key in cells) if (key in data) {
    set(cells[key], count(data[key]));
    cells[key].classList.toggle('zero', !data[key]);
  }
  const span = Math.min(300e3, Math.max(60e3, now - opened)), x = p => (100 - (now - p.at) / span * 100).toFixed(2);
  const points = past.map(p => `${x(p)},${(23 - p.depth / Math.max(high, 5) * 22).toFixed(1)}`).join(' ');
  find('polyline').setAttribute('points', points);
  find('polygon').setAttribute('points', `${x(past[0])},24 ${points} 100,24`);
  find('svg').classList.toggle('flat', !high);
  find('svg').ariaLabel = `Depth over the last ${age(span / 1000)}, at most ${count(high)}`;
  find('.badge').hidden = !data.paused;
  set(find('[data-do=pause]'), data.paused ? 'Unpause' : 'Pause');
  for (const button of find('.do').children) button.ariaLabel = `${button.textContent} ${title}`;
  if (!list || !data.clients) return;
  const lines = data.clients.map(c => [c.client_id, c.remote_address, c.user_agent, `ready ${count(c.ready_count)}`,
    `in flight ${count(c.in_flight_count)}`, `finished ${count(c.finish_count)}`, `requeued ${count(c.requeue_count)}`,
    `connected ${age(Date.now() / 1000 - c.connect_ts)}`].join(' \u00b7 ')).sort();
  list.replaceChildren(...(lines[0] ? lines : ['No client is subscribed.']).map(line => make('li', {}, line)));
}
function render(stats, now) {
  const sums = { Topics: 0, Channels: 0, Depth: 0, 'In flight': 0, 'In/s': 0, 'Out/s': 0, Clients: 0 };
  let place = table.tHead, alive = new Set();
  for (const t of stats.topics || []) for (const data of [t, ...t.channels]) {
    const channel = data.channel_name, key = `${t.topic_name}/${channel || ''}`;  // no name can hold a slash
    const row = rows.get(key) || addRow(t.topic_name, channel);
    rows.set(key, row);
    alive.add(row);
    if (place.nextElementSibling !== row.body) place.after(row.body);
    place = row.body;
    update(row, data, now);
    sums[channel ? 'Channels' : 'Topics']++;
    sums[channel ? 'Out/s' : 'In/s'] += row.data[channel ? 'out' : 'in'];
    sums.Depth += data.depth;
    sums['In flight'] += data.in_flight_count || 0;
    sums.Clients += data.client_count || 0;
  }
  for (const [key, row] of rows) if (!alive.has(row)) { row.body.remove(); rows.delete(key); }
  $('sums').replaceChildren(...Object.entries(sums).map(([name, n]) =>
    make('div', {}, make('dt', {}, name), make('dd', {}, count(n)))));
  set($('version'), `version ${stats.version}`);
  set($('uptime'), `up ${age(now / 1000 - stats.start_time)}`);
  set($('health'), stats.health === 'OK' ? 'healthy' : stats.health);
  $('health').className = stats.health === 'OK' ? 'good' : 'bad';
  filter();
}
function filter() {
  const text = $('filter').value.trim().toLowerCase();
  const found = new Set([...rows].filter(([key]) => key.toLowerCase().includes(text)).map(([, row]) => row));
  const topics = new Set([...found].map(row => row.topic));
  for (const row of rows.values()) row.body.hidden = !(row.channel ? found.has(row) : topics.has(row.topic));
  table.hidden = !found.size;
  $('empty').hidden = rows.size;
  $('none').hidden = found.size || !rows.size;
}
function say(text) {
  const place = document.querySelector('dialog[open] output') || $('toast');
  place.textContent = text;
  clearTimeout(quiet);
  quiet = setTimeout(() => { $('toast').textContent = document.querySelector('output').textContent = ''; }, 6000);
}
async function post(path, names, done, body) {
  try {
    const answer = await fetch(`${path}?${new URLSearchParams(names)}`, { method: 'POST', body });
    if (!answer.ok) throw Error((await answer.json()).message.toLowerCase().replaceAll('_', ' '));
    say(done);
    wake();
    return true;
  } catch (e) { say(`Not done: ${e instanceof TypeError ? 'nsqd does not answer' : e.message}`); }
}
const change = (verb, done, { kind, topic, channel, title }) =>
  post(`${kind}/${verb}`, channel ? { topic, channel } : { topic }, `${done} ${title}`);

function ask(verb, name, done, row) {
  const lost = [...rows.values()].filter(r => r === row || verb === 'delete' && !row.channel && r.topic === row.topic);
  const total = lost.reduce((n, r) => n + r.held, 0), dialog = $('confirm');
  set($('verb'), `${name} this ${row.kind}?`);
  set($('what'), row.title);
  set($('loss'), `${count(total)} message${total === 1 ? '' : 's'} will be lost${
    verb === 'empty' ? '' : `${row.channel ? '' : ', all channels deleted'} and all clients disconnected`}.`);
  set($('yes'), `${name} ${row.kind}`);
  dialog.returnValue = '';  // else Escape would repeat the last answer
  dialog.onclose = () => { if (dialog.returnValue) change(verb, done, row); };
  dialog.showModal();
}
function fill(verb, row) {
  const form = $('form').querySelector('form'), { elements } = form, create = verb === 'create';
  for (const id of ['create', 'publish']) $(id).hidden = $(id).disabled = id !== verb;
  set($('title'), create ? 'Create a topic or a channel' : 'Publish a message');
  set($('go'), create ? 'Create' : 'Publish');
  $('names').replaceChildren(...[...rows.values()].filter(r => !r.channel).map(r => make('option', {}, r.topic)));
  if (row) elements.topic.value = row.topic;
  form.onsubmit = async event => {
    event.preventDefault();
    const { topic, channel, body, defer } = Object.fromEntries(new FormData(form));
    if (!create) await post('pub', defer ? { topic, defer } : { topic }, `Published at ${time()}`, body);
    else if (await post('topic/create', { topic }, `Created topic ${topic}`) && channel)
      await post('channel/create', { topic, channel }, `Created channel ${channel} of topic ${topic}`);
  };
  $('form').showModal();
  (!row ? elements.topic : create ? elements.channel : elements.body).select();
}
function toggle(row, button) {
  if (row.list) row.list.closest('tr').remove();
  row.list = row.list ? null : make('ul');
  if (row.list) row.body.append(make('tr', {}, make('td', { colSpan: 12 }, row.list)));
  button.ariaExpanded = String(!!row.list);
  wake();
}
document.onclick = ({ target }) => {
  const button = target.closest('[data-do]'), row = button?.closest('tbody')?.row, verb = button?.dataset.do;
  if (verb === 'open') toggle(row, button);
  else if (verb === 'close') $('form').close();
  else if (verb === 'pause') change(...row.data.paused ? ['unpause', 'Unpaused'] : ['pause', 'Paused'], row);
  else if (verb === 'empty') ask(verb, 'Empty', 'Emptied', row);
  else if (verb === 'delete') ask(verb, 'Delete', 'Deleted', row);
  else if (verb) fill(verb, row);
};
async function live() {
  const get = path => fetch(path, { cache: 'no-store', signal: AbortSignal.timeout(5000) })
    .then(answer => answer.json()).catch(() => null);
  for (;; await new Promise(done => { wake = done; setTimeout(done, 1000); })) {
    const clients = [...rows.values()].some(r => r.list);
    const stats = await get(`stats?format=json&include_mem=false&include_clients=${clients}`), gone = !stats?.version;
    if ($('gone').hidden === gone) {
      set($('gone'), `nsqd stopped answering at ${time()}. Asking again every second.`);
      $('gone').hidden = !gone;
      document.body.classList.toggle('gone', gone);
      if (!gone) say('nsqd is back.');
    }
    if (gone) continue;
    render(stats, Date.now());
    const info = stats.start_time !== startTime && await get('info');
    if (info) set($('host'), `${info.hostname}, TCP port ${info.tcp_port}`);
    startTime = stats.start_time;
  }
}
for (const key in COLUMNS)
  table.querySelector('thead .do').before(make('th', { className: `n ${key}`, textContent: COLUMNS[key] }));
set($('try'), `curl -d hello '${location.origin}/pub?topic=clicks'`);
$('filter').oninput = filter;
live();
</script>
)page";

// ---------------------------------------------------------------------------------------------------------------------
// [12] HTTP
//
// A server for HTTP/1.1 and 1.0: keep-alive, pipelining, chunked bodies, Expect: 100-continue; then nsqd's endpoints, one
// row each in one table.
// Always: requests are answered in their order; nothing of a request is acted on before all of it has arrived.
// ---------------------------------------------------------------------------------------------------------------------

/// Takes what comes before the first `separator` from the front of `rest`, and the separator with it.
inline std::string_view cut(std::string_view& rest, char separator) {
  const std::string_view part = rest.substr(0, rest.find(separator));
  rest.remove_prefix(std::min(rest.size(), part.size() + 1));
  return part;
}

inline std::optional<size_t> hex_number(std::string_view digits) {
  const bool good = !digits.empty() && digits.size() <= 8 && digits.find_first_not_of("0123456789abcdefABCDEF") == digits.npos;
  return good ? std::optional<size_t>(std::stoul(std::string(digits), nullptr, 16)) : std::nullopt;
}

/// Undoes percent-encoding; in a query, + is a blank. Nothing where an escape is broken.
inline std::optional<std::string> percent_decoded(std::string_view encoded, bool in_query) {
  std::string out;
  for (size_t i = 0; i < encoded.size(); ++i) {
    out += in_query && encoded[i] == '+' ? ' ' : encoded[i];
    if (encoded[i] != '%') continue;
    const auto byte = hex_number(encoded.substr(i + 1, 2));
    if (!byte || encoded.size() - i < 3) return std::nullopt;
    out.back() = static_cast<char>(*byte);
    i += 2;
  }
  return out;
}

inline std::string percent_encoded(std::string_view plain) {
  std::string out;  // what names are made of needs no escape
  for (char c : plain) out += c == '~' || valid_name({&c, 1}) ? std::string(1, c) : hex_escape("%", static_cast<uint8_t>(c), 2);
  return out;
}

struct HttpHeaders {
  std::vector<std::pair<std::string, std::string>> list;

  std::vector<std::string_view> all(std::string_view name) const {
    std::vector<std::string_view> values;
    for (const auto& [key, value] : list)
      if (same_word(key, name)) values.push_back(value);
    return values;
  }

  const std::string* find(std::string_view name) const {
    const auto found = std::find_if(list.begin(), list.end(), [&](const auto& header) { return same_word(header.first, name); });
    return found == list.end() ? nullptr : &found->second;
  }

  /// Whether a header is a list that has this word in it.
  bool has(std::string_view name, std::string_view wanted) const {
    for (std::string_view rest : all(name))
      while (!rest.empty())
        if (same_word(trimmed(cut(rest, ',')), wanted)) return true;
    return false;
  }

  /// Takes the lines behind the first one; false where one is not a header.
  bool parse(std::string_view lines) {
    while (!lines.empty()) {
      std::string_view line = cut(lines, '\n');
      if (line.empty() || line == "\r") continue;
      const size_t colon = line.find(':');
      if (colon == line.npos || colon == 0 || line.substr(0, colon).find_first_of(" \t\"(),/;<=>?@[\\]{}") != line.npos) return false;
      list.emplace_back(line.substr(0, colon), trimmed(line.substr(colon + 1)));
    }
    return true;
  }
};

/// Joins the chunks of a body, as they arrive.
struct ChunkDecoder {
  enum class Result { kMore, kDone, kBad };
  std::string body = {};

  Result feed(std::string_view input, size_t& used, size_t most) {
    for (used = 0;;) {
      const size_t data = std::min(input.size() - used, left_);
      body.append(input.data() + used, data);
      used += data;
      left_ -= data;
      const size_t end = left_ > 0 ? input.npos : input.find('\n', used);
      if (end == input.npos) return left_ == 0 && input.size() - used > kLongestLine ? Result::kBad : Result::kMore;
      const std::string_view line = trimmed(input.substr(used, end - used));
      used = end + 1;
      if (next_ == Line::kTrailer && line.empty()) return Result::kDone;
      if (next_ == Line::kEndOfData && !line.empty()) return Result::kBad;
      if (next_ == Line::kSize && !begin_chunk(line, most)) return Result::kBad;
      if (next_ != Line::kTrailer) next_ = left_ > 0 ? Line::kEndOfData : Line::kSize;
    }
  }

 private:
  static constexpr size_t kLongestLine = 4096;
  enum class Line { kSize, kEndOfData, kTrailer };

  bool begin_chunk(std::string_view line, size_t most) {
    const auto size = hex_number(trimmed(line.substr(0, line.find(';'))));
    left_ = size.value_or(0);
    if (left_ == 0) next_ = Line::kTrailer;
    return size && body.size() + left_ <= most;
  }
  size_t left_ = 0;  // of the chunk at hand
  Line next_ = Line::kSize;
};

struct HttpRequest {
  std::string method, raw_path, path, query;  // path: decoded
  int minor = 1;                              // of HTTP/1.x
  HttpHeaders headers;
  bool keep_alive = true;
  std::map<std::string, std::string> parameters;  // the first of each name
  bool query_valid = true;
  bool chunked = false;
  size_t length = 0;  // of the body, where it is not chunked
  std::string body;

  const std::string* parameter(const std::string& name) const {
    const auto found = parameters.find(name);
    return found == parameters.end() ? nullptr : &found->second;
  }
  std::string value(const std::string& name) const { return parameter(name) == nullptr ? std::string() : *parameter(name); }
  bool wanted(const std::string& name) const { return value(name) != "false" && value(name) != "0"; }

  /// Reads request line and headers; the status of the refusal where they are wrong, else 0.
  int parse(std::string_view head) {
    if (const int wrong = parse_request_line(trimmed(cut(head, '\n')))) return wrong;
    if (!headers.parse(head)) return 400;
    const size_t hosts = headers.all("Host").size();
    if (hosts > 1 || (hosts == 0 && minor > 0)) return 400;
    keep_alive = minor > 0 ? !headers.has("Connection", "close") : headers.has("Connection", "keep-alive");
    parse_query();
    return parse_length();
  }

 private:
  int parse_request_line(std::string_view line) {
    method = cut(line, ' ');
    std::string_view target = cut(line, ' ');
    const auto digit = [&line](size_t at) { return line[at] >= '0' && line[at] <= '9'; };
    if (line.size() != 8 || line.substr(0, 5) != "HTTP/" || !digit(5) || line[6] != '.' || !digit(7)) return 400;
    if (line[5] != '1') return 505;
    minor = line[7] - '0';
    if (target.substr(0, 7) == "http://") {
      const size_t slash = target.find('/', 7);
      target = slash == target.npos ? "/" : target.substr(slash);
    }
    if (target != "*" && target.substr(0, 1) != "/") return 400;
    raw_path = cut(target, '?');
    query = target;
    const auto decoded = percent_decoded(raw_path, false);
    path = decoded.value_or(std::string());
    return decoded ? 0 : 400;
  }

  void parse_query() {
    for (std::string_view rest = query; !rest.empty();) {
      std::string_view pair = cut(rest, '&');
      if (pair.empty()) continue;
      const bool separated = pair.find(';') != pair.npos;  // as once was usual; Go refuses it
      const auto name = percent_decoded(cut(pair, '='), true);
      const auto value = percent_decoded(pair, true);
      if (!name || !value || separated) query_valid = false;
      else parameters.emplace(*name, *value);
    }
  }

  int parse_length() {
    const auto lengths = headers.all("Content-Length"), codings = headers.all("Transfer-Encoding");
    chunked = !codings.empty();
    for (std::string_view value : lengths) {
      const auto parsed = decimal(value);
      if (chunked || !parsed || parsed != decimal(lengths.front())) return 400;  // requests are smuggled so: never guess
      length = static_cast<size_t>(*parsed);
    }
    return chunked && !same_word(codings.front(), "chunked") ? 501 : 0;
  }
};

struct HttpResponse {
  int status = 200;
  std::string body = {};
  std::string_view type = {};  // empty: no Content-Type
  std::string extra = {};      // whole header lines
  bool nsq_header = true;

  static constexpr std::string_view kText = "text/plain; charset=utf-8", kJson = "application/json; charset=utf-8";
  static HttpResponse plain(std::string_view body) { return {200, std::string(body), body.empty() ? std::string_view() : kText}; }
  static HttpResponse json(std::string body) { return {200, std::move(body), kJson}; }
  static HttpResponse bare(int status, std::string extra) { return {status, {}, {}, std::move(extra), false}; }
  static HttpResponse error(int status, std::string_view word, std::string extra = {}) {
    return {status, text("{\"message\":\"", word, "\"}"), kJson, std::move(extra)};
  }
};

inline std::string_view status_text(int status) {
  static const std::map<int, std::string_view> kTexts = {
      {200, "OK"}, {301, "Moved Permanently"}, {307, "Temporary Redirect"}, {400, "Bad Request"}, {403, "Forbidden"}, {404, "Not Found"},
      {405, "Method Not Allowed"}, {413, "Request Entity Too Large"}, {431, "Request Header Fields Too Large"},
      {500, "Internal Server Error"}, {501, "Not Implemented"}, {503, "Service Unavailable"}, {505, "HTTP Version Not Supported"}};
  const auto found = kTexts.find(status);
  return found == kTexts.end() ? "Error" : found->second;
}

/// A setting as GET /config shows it, and the change of one; defined with the table of flags in [16].
struct ShownOption {
  std::string value;
  bool json = true;
};
inline std::optional<ShownOption> show_option(const Options& options, std::string_view key);
inline std::optional<Level> parse_level(std::string_view word);

class HttpSession : public Session {
 public:
  HttpSession(Host& host, Options& options, Logger& logger, std::string address, std::function<std::pair<int, int>()> ports)
      : host_(host), broker_(host.broker), options_(options), logger_(logger), address_(std::move(address)), ports_(std::move(ports)),
        timer_(broker_.timers, [this] { port.dropped = true, port.attend(); }) {
    port.session = this;
    timer_.set(broker_.now.steady + kPatience);
  }

  size_t feed(std::string_view input) override {
    const size_t given = input.size();
    while (!parked && !port.closing && (in_body_ ? take_body(input) : take_head(input))) continue;
    const bool idle = !in_body_ && input.empty();  // it may stay so for as long as the client likes
    if (idle || parked) timer_.set(kNever);
    else if (timer_.due() == kNever) timer_.set(broker_.now.steady + kPatience);
    return given - input.size();
  }
  void ended(std::string_view) override { port.closing = true; }

 private:
  static constexpr size_t kLargestHead = (size_t{1} << 20) + 4096;  // as Go's net/http
  static constexpr int64_t kPatience = 60 * kSecond;  // for a whole request: two default heartbeats of the other protocol

  // ---- From bytes to requests -----------------------------------------------------------------------------------------

  /// Where the head ends, with the empty line behind it; npos while that has not arrived.
  static size_t end_of_head(std::string_view input, size_t from) {
    for (size_t at = input.find('\n', from); at != input.npos; at = input.find('\n', at + 1)) {
      const std::string_view after = input.substr(at + 1, 2);
      if (after.substr(0, 1) == "\n") return at + 2;
      if (after == "\r\n") return at + 3;
    }
    return input.npos;
  }

  /// This and take_body take what they need from the front of `input`, and return whether they came to its end.
  bool take_head(std::string_view& input) {
    if (searched_ == 0) input.remove_prefix(std::min(input.size(), input.find_first_not_of("\r\n")));  // RFC 9112 allows empty lines
    const size_t end = end_of_head(input, searched_);
    if (end == input.npos && input.size() <= kLargestHead) {
      searched_ = input.size() - std::min<size_t>(input.size(), 3);
      return false;
    }
    searched_ = 0;
    const std::string_view head = input.substr(0, end);
    input.remove_prefix(head.size());
    request_ = HttpRequest();
    chunks_ = ChunkDecoder();
    if (const int wrong = head.size() > kLargestHead ? 431 : request_.parse(head)) return refuse(wrong);
    if (refuse_by_length()) return false;
    in_body_ = true;
    if (request_.minor > 0 && (request_.chunked || request_.length > 0) && request_.headers.has("Expect", "100-continue")) {
      port.out.append("HTTP/1.1 100 Continue\r\n\r\n");
      port.attend();
    }
    return true;
  }

  /// A body that is too large by its own account is not waited for.
  bool refuse_by_length() {
    const std::string& path = request_.path;
    const bool pub = path == "/pub", config = path.compare(0, 8, "/config/") == 0;
    const bool get = request_.method == "GET";  // a body that is not looked at
    const size_t limit = !get && (pub || config) ? largest_message() : !get && path == "/mpub" ? largest_body() : std::max(largest_message(), largest_body());
    if (request_.length <= limit) return false;
    request_.keep_alive = false;
    send(HttpResponse::error(413, pub ? "MSG_TOO_BIG" : config ? "INVALID_VALUE" : "BODY_TOO_BIG"));
    return true;
  }

  /// Comes here again when the answer was parked: then the body is complete, and nothing is taken.
  bool take_body(std::string_view& input) {
    size_t used = 0;
    if (request_.chunked) {
      const auto result = chunks_.feed(input, used, std::max(largest_message(), largest_body()) + 1);
      input.remove_prefix(used);
      if (result == ChunkDecoder::Result::kBad) return refuse(400);
      if (result == ChunkDecoder::Result::kMore) return false;
      request_.chunked = false;
      request_.body = std::move(chunks_.body);
      request_.length = request_.body.size();
    }
    used = std::min(input.size(), request_.length - request_.body.size());
    request_.body.append(input.data(), used);
    input.remove_prefix(used);
    return request_.body.size() == request_.length && answer();
  }

  bool answer() {
    const int64_t begun = broker_.now.steady;
    response_ = HttpResponse();
    route();
    if (parked) return false;
    const auto& [method, path, query] = std::tie(request_.method, request_.raw_path, request_.query);
    if (request_.path != "/pub" && request_.path != "/mpub")
      logger_.say(Level::kInfo, response_.status, " ", method, " ", path, query.empty() ? "" : "?", query, " (", address_, ") ",
                  duration_text(broker_.now.steady - begun));
    send(response_);
    in_body_ = false;
    return true;
  }

  void send(const HttpResponse& response) {
    const time_t now = static_cast<time_t>(broker_.now.wall / kSecond);
    tm utc{};
    const std::string date = time_text("%a, %d %b %Y %H:%M:%S GMT", *::gmtime_r(&now, &utc));
    std::string head = text("HTTP/1.1 ", response.status, " ", status_text(response.status), "\r\nDate: ", date, "\r\n", response.extra);
    if (!response.type.empty()) head += text("Content-Type: ", response.type, "\r\n");
    if (response.nsq_header) head += "X-Nsq-Content-Type: nsq; version=1.0\r\n";
    if (!request_.keep_alive) head += "Connection: close\r\n";
    else if (request_.minor == 0) head += "Connection: keep-alive\r\n";
    port.out.append(text(head, "Content-Length: ", response.body.size(), "\r\n\r\n"));
    if (request_.method != "HEAD") port.out.append(response.body);
    if (!request_.keep_alive) port.closing = true;
    port.attend();
  }

  /// What is no request ends the connection: nobody knows where the next one begins.
  bool refuse(int status) {
    request_.keep_alive = false;
    request_.method.clear();
    send({status, text(status, " ", status_text(status)), HttpResponse::kText, {}, false});
    return false;
  }

  // ---- From requests to answers ---------------------------------------------------------------------------------------

  struct Route {
    std::string_view path, method;
    std::function<void(HttpSession&)> run;
  };
  static const std::vector<Route>& routes() {
    using S = HttpSession;
    static const std::vector<Route> kRoutes = {
        {"/pub", "POST", &S::pub},
        {"/mpub", "POST", &S::mpub},
        {"/ping", "GET", &S::ping},
        {"/info", "GET", &S::info},
        {"/stats", "GET", &S::show_stats},
        {"/metrics", "GET", &S::show_metrics},
        {"page", "GET", &S::show_page},
        {"/config/:key", "GET", &S::config_get},
        {"/config/:key", "PUT", &S::config_put},
        {"/topic/create", "POST", &S::wanted_topic},
        {"/topic/delete", "POST", [](S& s) { if (Topic* topic = s.known_topic()) s.broker_.delete_topic(*topic); }},
        {"/topic/empty", "POST", [](S& s) { if (Topic* topic = s.known_topic("INVALID_TOPIC")) topic->empty(); }},
        {"/topic/pause", "POST", [](S& s) { if (Topic* topic = s.known_topic()) topic->pause(true); }},
        {"/topic/unpause", "POST", [](S& s) { if (Topic* topic = s.known_topic()) topic->pause(false); }},
        {"/channel/create", "POST", [](S& s) { s.named_channel(true); }},
        {"/channel/delete", "POST", [](S& s) { if (Channel* channel = s.named_channel()) channel->topic.delete_channel(*channel); }},
        {"/channel/empty", "POST", [](S& s) { if (Channel* channel = s.named_channel()) channel->empty(); }},
        {"/channel/pause", "POST", [](S& s) { if (Channel* channel = s.named_channel()) channel->pause(true); }},
        {"/channel/unpause", "POST", [](S& s) { if (Channel* channel = s.named_channel()) channel->pause(false); }},
    };
    return kRoutes;
  }
  static std::string_view pattern_of(std::string_view path) {
    const bool config = path.substr(0, 8) == "/config/" && path.size() > 8 && path.find('/', 8) == path.npos;
    return config ? "/config/:key" : path;
  }

  /// Carries out a request. Its response is 200 with nothing, unless somebody on the way sets another.
  void route() {
    std::set<std::string_view> methods;
    const bool page = request_.path == "/" && request_.headers.has("Accept", "text/html");  // nsqd has none: others get its 404
    const std::string_view wanted = page ? "page" : pattern_of(request_.path);
    for (const Route& candidate : routes()) {
      if (candidate.path != wanted) continue;
      if (candidate.method == request_.method)
        return candidate.method != "GET" && forged() ? fail(403, "CROSS_SITE_REQUEST") : candidate.run(*this);
      methods.insert(candidate.method);
    }
    const bool options = request_.method == "OPTIONS";
    if (methods.empty() && !(options && request_.path == "*")) return redirect();
    std::string allow;
    if (!methods.empty()) methods.insert("OPTIONS");
    for (std::string_view method : methods) allow += text(allow.empty() ? "Allow: " : ", ", method);
    if (!allow.empty()) allow += "\r\n";
    if (options) response_ = HttpResponse::bare(200, allow);
    else response_ = HttpResponse::error(405, "METHOD_NOT_ALLOWED", allow);
  }
  void fail(int status, std::string_view word) { response_ = HttpResponse::error(status, word); }

  /// A path that is wrong only by slashes, dots or letter case leads to the right one.
  void redirect() {
    std::string path;
    for (std::string_view rest = request_.path; !rest.empty();) {
      const std::string_view part = cut(rest, '/');
      if (part == "..") path.erase(std::min(path.size(), path.rfind('/')));
      else if (!part.empty() && part != ".") path += "/" + lower(part);
    }
    const auto leads_there = [&](const Route& route) { return route.path == pattern_of(path); };
    if (path == request_.path || std::none_of(routes().begin(), routes().end(), leads_there)) return fail(404, "NOT_FOUND");
    std::string encoded = path;  // only a key of /config may have something in it that needs that
    if (const size_t key = path.rfind('/') + 1; key > 1) encoded = path.substr(0, key) + percent_encoded(std::string_view(path).substr(key));
    const std::string_view mark = request_.query.empty() ? "" : "?";
    response_ = HttpResponse::bare(request_.method == "GET" ? 301 : 307, text("Location: ", encoded, mark, request_.query, "\r\n"));
  }

  /// Whether a browser sends this on behalf of a page of another site. Programs that are no browsers send neither header.
  bool forged() const {
    const HttpHeaders& headers = request_.headers;
    const std::string *origin = headers.find("Origin"), *site = headers.find("Sec-Fetch-Site"), *host = headers.find("Host");
    if (origin == nullptr && site == nullptr) return false;
    if (site != nullptr && *site != "same-origin" && *site != "none") return true;
    if (host == nullptr || (origin != nullptr && !same_word(*origin, "http://" + *host))) return true;
    const std::string name = lower(host->substr(0, ends_with(*host, "]") ? host->npos : host->rfind(':')));
    if (name.size() > 2 && name.front() == '[') return false;  // an address: no name that could have been rebound
    std::array<char, 16> address{};
    if (::inet_pton(AF_INET, name.c_str(), address.data()) == 1) return false;
    return name != "localhost" && !ends_with(name, ".localhost") && name != lower(host_name()) && name != lower(options_.broadcast_address);
  }

  // ---- The endpoints. Where something is wrong with a request, null is returned, and the response tells ------------------

  const std::string* given_name(const std::string& parameter, std::string_view missing, std::string_view invalid) {
    const std::string* name = request_.parameter(parameter);
    if (!request_.query_valid) return fail(400, "INVALID_REQUEST"), nullptr;
    if (name == nullptr) return fail(400, missing), nullptr;
    if (!invalid.empty() && !valid_name(*name)) return fail(400, invalid), nullptr;
    return name;
  }

  Topic* known_topic(std::string_view invalid = {}) {
    const std::string* name = given_name("topic", "MISSING_ARG_TOPIC", invalid);
    Topic* topic = name == nullptr ? nullptr : broker_.find(*name);
    if (name != nullptr && topic == nullptr) fail(404, "TOPIC_NOT_FOUND");
    return topic;
  }

  /// Makes the topic if need be; null, too, while the request is parked because nsqlookupd has to be asked first.
  Topic* wanted_topic() {
    const std::string* name = given_name("topic", "MISSING_ARG_TOPIC", "INVALID_TOPIC");
    if (name == nullptr || (broker_.find(*name) == nullptr && host_.look_up(*name, *this))) return nullptr;
    return &broker_.topic(*name);
  }

  Channel* named_channel(bool make = false) {
    if (given_name("topic", "MISSING_ARG_TOPIC", "INVALID_ARG_TOPIC") == nullptr) return nullptr;
    const std::string* name = given_name("channel", "MISSING_ARG_CHANNEL", "INVALID_ARG_CHANNEL");
    Topic* topic = name == nullptr ? nullptr : known_topic();
    if (topic == nullptr) return nullptr;
    Status status;
    Channel* channel = make ? topic->channel(*name, status) : topic->find(*name);
    if (channel == nullptr) make ? fail(500, "INTERNAL_ERROR") : fail(404, "CHANNEL_NOT_FOUND");
    return channel;
  }

  void ping() {
    const std::string health = broker_.storage.health();
    response_ = {health == "OK" ? 200 : 500, health, HttpResponse::kText, {}, false};
  }

  void info() {
    const auto [tcp_port, http_port] = ports_();
    JsonWriter json;
    json.open('{').member("version", kProtocolVersion).member("broadcast_address", options_.broadcast_address);
    json.member("hostname", host_name()).member("http_port", http_port).member("tcp_port", tcp_port);
    json.member("start_time", host_.started_wall / kSecond);
    json.member("max_heartbeat_interval", static_cast<int64_t>(options_.max_heartbeat_interval.count()));
    json.member("max_output_buffer_size", options_.max_output_buffer_size);
    json.member("max_output_buffer_timeout", static_cast<int64_t>(options_.max_output_buffer_timeout.count()));
    json.member("max_deflate_level", options_.max_deflate_level);
    json.member("topology_zone", options_.topology_zone).member("topology_region", options_.topology_region).close('}');
    response_ = HttpResponse::json(json.out);
  }

  void show_stats() {
    if (!request_.query_valid) return fail(400, "INVALID_REQUEST");
    const HttpRequest& given = request_;
    const StatsQuery query{given.value("topic"), given.value("channel"), given.wanted("include_clients"), given.wanted("include_mem")};
    const Stats stats = take_stats(host_, query);
    const bool topic_known = query.topic.empty() || broker_.find(query.topic) != nullptr;
    if (given.value("format") == "json") response_ = HttpResponse::json(stats_json(stats, query, topic_known));
    else response_ = HttpResponse::plain(stats_text(stats, query, broker_.now, host_.started_wall));
  }

  void show_metrics() {
    StatsQuery query;
    query.include_clients = false;
    response_ = HttpResponse::plain(MetricsText::of(take_stats(host_, query), host_.connections()));
    response_.type = "text/plain; version=0.0.4; charset=utf-8";
  }

  void show_page() {
    response_ = HttpResponse::bare(200, text("Cache-Control: no-cache\r\nX-Content-Type-Options: nosniff\r\nContent-Security-Policy: ", kPagePolicy, "\r\n"));
    response_.type = "text/html; charset=utf-8";
    response_.body = kPage;
  }

  size_t largest_message() const { return static_cast<size_t>(options_.max_msg_size); }
  size_t largest_body() const { return static_cast<size_t>(options_.max_body_size); }

  void publish(Topic& topic, const std::vector<std::string_view>& bodies, int64_t delay) {
    if (topic.publish(bodies.data(), bodies.size(), delay).ok()) response_ = HttpResponse::plain("OK");
    else fail(503, "EXITING");
  }

  void pub() {
    if (request_.body.size() > largest_message()) return fail(413, "MSG_TOO_BIG");
    if (request_.body.empty()) return fail(400, "MSG_EMPTY");
    Topic* topic = wanted_topic();
    if (topic == nullptr) return;
    const std::string* defer = request_.parameter("defer");
    const auto ms = decimal(defer == nullptr ? "0" : *defer, true);
    if (!ms || *ms < 0 || *ms > options_.max_req_timeout.count() / kMillisecond) return fail(400, "INVALID_DEFER");
    publish(*topic, {request_.body}, *ms * kMillisecond);
  }

  void mpub() {
    Topic* topic = wanted_topic();
    if (topic == nullptr) return;
    const std::string* binary = request_.parameter("binary");
    const bool as_lines = binary == nullptr || !request_.wanted("binary");
    if (!as_lines && *binary != "true" && *binary != "1")
      logger_.say(Level::kWarning, "deprecated value '", *binary, "' used for /mpub binary param");
    std::vector<std::string_view> bodies;
    const std::string_view wrong = as_lines ? split_lines(bodies) : split_binary(bodies);
    if (wrong.empty()) publish(*topic, bodies, 0);
    else fail(413, wrong);
  }

  /// This and split_binary return the word for what is wrong with the body.
  std::string_view split_lines(std::vector<std::string_view>& bodies) const {
    if (request_.body.size() > largest_body()) return "BODY_TOO_BIG";
    for (std::string_view rest = request_.body; !rest.empty();) {
      const std::string_view line = cut(rest, '\n');
      if (line.size() > largest_message()) return "MSG_TOO_BIG";
      if (!line.empty()) bodies.push_back(line);
    }
    return {};
  }

  /// count { size body }*
  std::string_view split_binary(std::vector<std::string_view>& bodies) const {
    std::string_view rest = request_.body;
    const auto take_number = [&rest] {  // 0 where the body ends too early; as a number, it would be wrong as well
      const int32_t number = rest.size() < 4 ? 0 : static_cast<int32_t>(get_be<uint32_t>(rest.data()));
      rest.remove_prefix(std::min<size_t>(rest.size(), 4));
      return number;
    };
    const int32_t count = take_number();
    if (count <= 0 || count > (options_.max_body_size - 4) / 5) return "BAD_BODY";
    while (bodies.size() < static_cast<size_t>(count)) {
      const int32_t size = take_number();
      if (size <= 0 || size > options_.max_msg_size || rest.size() < static_cast<size_t>(size)) return "BAD_MESSAGE";
      bodies.push_back(rest.substr(0, static_cast<size_t>(size)));
      rest.remove_prefix(static_cast<size_t>(size));
    }
    return {};
  }

  std::string_view config_key() const { return std::string_view(request_.path).substr(8); }

  void config_get() {
    const auto shown = show_option(options_, config_key());
    if (!shown) return fail(400, "INVALID_OPTION");
    response_ = shown->json ? HttpResponse::json(shown->value) : HttpResponse::plain(shown->value);
  }

  void config_put() {
    const std::string& value = request_.body;
    if (value.empty() || value.size() > largest_message()) return fail(413, "INVALID_VALUE");
    if (config_key() == "log_level") {
      const auto level = parse_level(value);
      if (!level) return fail(400, "INVALID_VALUE");
      options_.log_level = *level;
      logger_.set_level(*level);
    } else if (config_key() == "nsqlookupd_tcp_addresses") {
      JsonParser parser{value};
      const Json list = parser.parse();
      std::vector<std::string> addresses;
      for (const Json& item : list.items)
        if (item.is(Json::Type::kString)) addresses.push_back(item.string);
      const bool strings = addresses.size() == list.items.size();
      if (!parser.error.empty() || !list.is(Json::Type::kArray) || !strings) return fail(400, "INVALID_VALUE");
      host_.set_lookupds(addresses);
    } else {
      return fail(400, "INVALID_OPTION");
    }
    config_get();
  }

  Host& host_;
  Broker& broker_;
  Options& options_;
  Logger& logger_;
  std::string address_;
  std::function<std::pair<int, int>()> ports_;  // TCP and HTTP, as listened on
  HttpRequest request_;
  HttpResponse response_;
  ChunkDecoder chunks_;
  bool in_body_ = false;        // the head has arrived; with it, the body may have, too
  size_t searched_ = 0;         // of a head that has not arrived whole, up to where its end was looked for
  Timer timer_;
};

// ---------------------------------------------------------------------------------------------------------------------
// [13] Peers
//
// Servers that the daemon speaks to: nsqlookupd (over TCP, and its HTTP side) and the auth server. Each is a session like
// those of the clients, only that we begin it.
// Always: nobody waits for a peer but the command that needs its answer, and that no longer than the peer's time limit.
// ---------------------------------------------------------------------------------------------------------------------

/// Opens a connection for a session; its connected() or ended() is called later. Part of the loop.
using Dial = std::function<void(const std::string& address, std::shared_ptr<Session> session)>;

/// One request to an HTTP server, as "Connection: close" has it. `done` gets the status and body, or status 0 and why not.
class HttpCall : public Session {
 public:
  using Done = std::function<void(int status, const std::string& body)>;

  HttpCall(Broker& broker, std::string request, Done done)
      : broker_(broker), request_(std::move(request)), done_(std::move(done)), timer_(broker.timers, [this] { finish(0, "timed out"); }) {
    port.session = this;
    timer_.set(saturating_add(broker.now.steady, broker.options.http_client_connect_timeout.count()));
  }
  static std::string request_text(std::string_view method, std::string_view host, std::string_view target, std::string_view body) {
    std::string head = text(method, " ", target, " HTTP/1.1\r\nHost: ", host, "\r\nUser-Agent: nsqd.hpp/", kVersion,
                            "\r\nAccept: application/vnd.nsq; version=1.0\r\nConnection: close\r\n");
    if (method == "POST") head += text("Content-Type: application/json\r\nContent-Length: ", body.size(), "\r\n");
    return text(head, "\r\n", body);
  }
  void connected() override {
    timer_.set(saturating_add(broker_.now.steady, broker_.options.http_client_request_timeout.count()));
    port.out.append(request_);
    port.attend();
  }
  size_t feed(std::string_view input) override {
    received_ += input;
    if (received_.size() > kLargestAnswer) finish(0, "answer too large");
    else examine(false);
    return input.size();
  }
  void ended(std::string_view rest) override {
    received_ += rest;
    examine(true);
    finish(0, "connection closed");
  }

 private:
  static constexpr size_t kLargestAnswer = size_t{4} << 20;

  void examine(bool final) {
    const std::string_view all = received_;
    const size_t line = all.find("\r\n"), end = all.find("\r\n\r\n");
    if (end == all.npos) return;
    const auto status = all.substr(0, 7) == "HTTP/1." ? decimal(all.substr(9, 3)) : std::nullopt;
    HttpHeaders headers;
    if (!status || !headers.parse(all.substr(line + 2, end - line))) return finish(0, "not HTTP");
    examine_body(static_cast<int>(*status), headers, all.substr(end + 4), final);
  }
  void examine_body(int status, const HttpHeaders& headers, std::string_view body, bool final) {
    const std::string* length = headers.find("Content-Length");
    if (headers.has("Transfer-Encoding", "chunked")) {
      ChunkDecoder chunks;
      size_t used = 0;
      const auto result = chunks.feed(body, used, kLargestAnswer);
      if (result == ChunkDecoder::Result::kDone) finish(status, chunks.body);
      if (result == ChunkDecoder::Result::kBad) finish(0, "bad chunks");
    } else if (length != nullptr) {
      const auto size = decimal(*length);
      if (!size) finish(0, "bad length");
      else if (body.size() >= static_cast<size_t>(*size)) finish(status, std::string(body.substr(0, static_cast<size_t>(*size))));
    } else if (final) {
      finish(status, std::string(body));
    }
  }
  void finish(int status, const std::string& body) {
    port.dropped = true;
    port.attend();
    if (const Done done = std::exchange(done_, nullptr)) done(status, body);
  }
  Broker& broker_;
  std::string request_, received_;
  Done done_;
  Timer timer_;
};

/// The connection to one nsqlookupd: magic, IDENTIFY, what there is, then each change, and PING in between.
/// Always: one command is under way at most; after a failure it connects again, after pauses that grow, and repeats all.
class LookupPeer {
 public:
  struct Identity {
    std::string json;                                         // the body of IDENTIFY
    std::function<std::vector<std::string>()> registrations;  // REGISTER commands for all that there is
  };
  LookupPeer(Broker& broker, Dial dial, std::string peer_address, const Identity& identity)
      : address(std::move(peer_address)), broker_(broker), dial_(std::move(dial)), identity_(identity),
        timer_(broker.timers, [this] { on_timer(); }) {
    connect();
  }
  ~LookupPeer() { close(); }

  const std::string address;
  /// host:port of its HTTP side; empty when it has told none.
  std::string http_address() const {
    const std::string& host = broadcast_address_;
    if (host.empty() || http_port_ == 0 || host.find('/') != host.npos) return {};
    return text(host.find(':') == host.npos ? host : "[" + host + "]", ":", http_port_);
  }
  void tell(const std::string& command) {
    if (link_ == nullptr) {
      if (broker_.now.steady - tried_at_ > 100 * kMillisecond) connect();
    } else if (established_) {
      commands_.push_back(command);
      send_next();
    }
  }

 private:
  static constexpr int64_t kPatience = kSecond, kPing = 15 * kSecond, kLongestPause = 15 * kSecond;  // nsqd 1.3.0

  class Link : public Session {
   public:
    explicit Link(LookupPeer* of) : peer(of) { port.session = this; }
    void connected() override {
      if (peer != nullptr) peer->on_connected();
    }
    size_t feed(std::string_view input) override {
      size_t used = 0;
      while (peer != nullptr && input.size() - used >= 4) {
        const size_t size = get_be<uint32_t>(input.data() + used);
        if (size > static_cast<size_t>(peer->broker_.options.max_body_size)) {
          peer->fail("answer too large");
          return input.size();
        }
        if (input.size() - used - 4 < size) break;
        peer->on_answer(input.substr(used + 4, size));
        used += 4 + size;
      }
      return used;
    }
    void ended(std::string_view) override {
      port.dropped = true;
      if (peer != nullptr) peer->fail("connection closed");
    }
    LookupPeer* peer;
  };

  void connect() {
    tried_at_ = broker_.now.steady;
    link_ = std::make_shared<Link>(this);
    established_ = awaiting_ = false;
    commands_.clear();
    timer_.set(broker_.now.steady + kPatience);
    dial_(address, link_);
  }
  void close() {
    if (link_ == nullptr) return;
    link_->peer = nullptr;
    link_->port.dropped = true;
    link_->port.attend();
    link_.reset();
  }
  void fail(std::string_view why) {
    broker_.logger.say(Level::kError, "LOOKUPD(", address, "): ", why);
    close();
    broadcast_address_.clear();
    pause_ = std::min(pause_ * 2, kLongestPause);
    timer_.set(broker_.now.steady + pause_);
  }
  void on_connected() {
    established_ = true;
    link_->port.out.append("  V1");
    std::array<char, 4> size;
    put_be(size.data(), static_cast<uint32_t>(identity_.json.size()));
    commands_.push_back(text("IDENTIFY\n", std::string_view(size.data(), 4), identity_.json));
    for (std::string& command : identity_.registrations()) commands_.push_back(std::move(command));
    send_next();
  }
  void send_next() {
    if (awaiting_ || commands_.empty()) return;
    link_->port.out.append(commands_.front());
    link_->port.attend();
    awaiting_ = true;
    timer_.set(broker_.now.steady + kPatience);
  }
  void on_answer(std::string_view answer) {
    if (!awaiting_) return fail("answer without a question");
    if (commands_.front().compare(0, 8, "IDENTIFY") == 0) {
      JsonParser parser{answer};
      const Json json = parser.parse();
      if (!parser.error.empty() || !json.is(Json::Type::kObject)) return fail(text("IDENTIFY was answered by ", answer.substr(0, 100)));
      broadcast_address_ = member_of(json, "broadcast_address").string;
      http_port_ = member_of(json, "http_port").integer().value_or(0);
      broker_.logger.say(Level::kInfo, "LOOKUPD(", address, "): connected");
      pause_ = kSecond / 8;
    }
    commands_.pop_front();
    awaiting_ = false;
    timer_.set(broker_.now.steady + kPing);
    send_next();
  }
  void on_timer() {
    if (link_ == nullptr) return connect();
    if (!established_ || awaiting_) return fail("no answer in time");
    commands_.push_back("PING\n");
    send_next();
  }

  Broker& broker_;
  Dial dial_;
  const Identity& identity_;
  std::shared_ptr<Link> link_;
  bool established_ = false, awaiting_ = false;
  std::deque<std::string> commands_;  // the first one is under way when awaiting_
  int64_t pause_ = kSecond / 8, tried_at_ = 0;
  std::string broadcast_address_;
  int64_t http_port_ = 0;
  Timer timer_;
};

/// All peers, the topics that wait for them, and the questions to the auth server.
class Cluster {
 public:
  Cluster(Broker& broker, Dial dial) : broker_(broker), dial_(std::move(dial)) {
    identity_.registrations = [this] { return registrations(); };
  }

  void start(int tcp_port, int http_port) {
    const Options& options = broker_.options;
    JsonWriter json;  // keys sorted, as nsqd's are
    json.open('{').member("broadcast_address", options.broadcast_address).member("hostname", host_name()).member("http_port", http_port);
    json.member("tcp_port", tcp_port).member("topology_region", options.topology_region).member("topology_zone", options.topology_zone);
    identity_.json = json.member("version", kProtocolVersion).close('}').out;
    set_peers(options.lookupd_tcp_address);
  }
  void set_peers(const std::vector<std::string>& addresses) {
    for (auto peer = peers_.begin(); peer != peers_.end();)
      peer = std::find(addresses.begin(), addresses.end(), peer->first) == addresses.end() ? peers_.erase(peer) : std::next(peer);
    for (const std::string& address : addresses)
      if (peers_.count(address) == 0) peers_.emplace(address, std::make_unique<LookupPeer>(broker_, dial_, address, identity_));
  }
  void stop() {
    peers_.clear();
    look_ups_.clear();
  }
  void tell(const Topic& topic, const Channel* channel, bool created) {
    const std::string name = channel == nullptr ? topic.name : text(topic.name, " ", channel->name);
    const std::string command = text(created ? "REGISTER " : "UNREGISTER ", name, "\n");
    for (auto& [address, peer] : peers_) peer->tell(command);
  }

  /// Makes a topic and asks for its channels; nothing is handed over before all peers have answered or failed. False when
  /// there is nobody to ask. The session is parked for that long; other publishers may store meanwhile.
  bool look_up(std::string_view name, Session& session) {
    if (peers_.empty()) return false;
    Topic& topic = broker_.topic(name);
    std::vector<std::string> servers;
    for (const auto& [address, peer] : peers_)
      if (std::string server = peer->http_address(); !server.empty()) servers.push_back(std::move(server));
    if (servers.empty()) {
      broker_.logger.say(Level::kError, "no available nsqlookupd to query for channels to pre-create for topic ", name);
      return false;
    }
    LookUp& look_up = look_ups_[topic.name];
    look_up.missing = servers.size();
    look_up.waiting.push_back(session.weak_from_this());
    topic.hold_back(true);
    session.parked = true;
    for (const std::string& server : servers) {
      auto done = [this, topic_name = topic.name, server](int status, const std::string& body) {
        take_channels(topic_name, server, status, body);
      };
      const std::string request = HttpCall::request_text("GET", server, "/channels?topic=" + percent_encoded(name), {});
      dial_(server, std::make_shared<HttpCall>(broker_, request, done));
    }
    return true;
  }

  /// Asks the auth servers, beginning with a random one, until one gives a usable answer.
  void ask_auth(V2Session& session) {
    const auto& servers = broker_.options.auth_http_address;
    session.parked = true;
    ask_auth_server(session, static_cast<size_t>(broker_.now.wall / kMicrosecond) % servers.size(), servers.size());
  }

 private:
  struct LookUp {
    size_t missing = 0;  // answers
    std::set<std::string> channels;
    std::vector<std::weak_ptr<Session>> waiting;
  };

  std::vector<std::string> registrations() const {
    std::vector<std::string> commands;
    for (const auto& [name, topic] : broker_.topics) {
      if (topic->channels.empty()) commands.push_back(text("REGISTER ", name, "\n"));
      for (const auto& [channel_name, channel] : topic->channels) commands.push_back(text("REGISTER ", name, " ", channel_name, "\n"));
    }
    return commands;
  }

  void take_channels(const std::string& name, const std::string& server, int status, const std::string& body) {
    const auto found = look_ups_.find(name);
    if (found == look_ups_.end()) return;
    LookUp& look_up = found->second;
    JsonParser parser{body};
    const Json answer = status == 200 ? parser.parse() : Json();
    const bool usable = parser.error.empty() && answer.find("channels") != nullptr;
    if (!usable) {
      const std::string why = status == 200 ? "unusable answer" : body.substr(0, 100);
      broker_.logger.say(Level::kWarning, "failed to query nsqlookupd ", server, " for channels of topic ", name, " - ", why);
    }
    for (const Json& channel : usable ? member_of(answer, "channels").items : std::vector<Json>())
      if (valid_name(channel.string) && !is_ephemeral(channel.string)) look_up.channels.insert(channel.string);
    if (--look_up.missing > 0) return;
    const LookUp complete = std::move(look_up);
    look_ups_.erase(found);
    if (Topic* topic = broker_.find(name)) {
      Status made;
      for (const std::string& channel : complete.channels) static_cast<void>(topic->channel(channel, made));
      topic->hold_back(false);
    }
    for (const auto& waiting : complete.waiting) {
      if (const auto session = waiting.lock()) session->unpark();
    }
  }

  std::string auth_request(const V2Session& session, const std::string& host, const std::string& path) const {
    using List = std::vector<std::string>;
    if (broker_.options.auth_http_request_method == "post") {
      JsonWriter json;
      json.open('{').member("common_name", List{""}).member("remote_ip", List{session.ip()});
      json.member("secret", List{session.secret()}).member("tls", List{"false"}).close('}');
      return HttpCall::request_text("POST", host, path, json.out);
    }
    const std::string ip = percent_encoded(session.ip()), secret = percent_encoded(session.secret());
    const std::string_view separator = path.find('?') == path.npos ? "?" : "&";
    return HttpCall::request_text("GET", host, text(path, separator, "common_name=&remote_ip=", ip, "&secret=", secret, "&tls=false"), {});
  }

  void ask_auth_server(V2Session& session, size_t which, size_t left) {
    const auto& servers = broker_.options.auth_http_address;
    const std::string& server = servers[which % servers.size()];
    auto done = [this, asker = session.weak_from_this(), which, left, server](int status, const std::string& body) {
      auto grant = status == 200 ? parse_grant(body) : nullptr;
      if (grant == nullptr)
        broker_.logger.say(Level::kError, "AUTH: ", server, " - ", status == 0 ? body : text("unusable answer, status ", status));
      const auto locked = asker.lock();
      if (locked == nullptr) return;
      auto& waiting = static_cast<V2Session&>(*locked);
      if (grant == nullptr && left > 1) ask_auth_server(waiting, which + 1, left - 1);
      else waiting.auth_answered(std::move(grant));
    };
    const std::string url = server.find("://") == server.npos ? text("http://", server, "/auth") : server;
    const size_t begin = url.find("://") + 3, slash = std::min(url.find('/', begin), url.size());
    const std::string host = url.substr(begin, slash - begin), path = slash < url.size() ? url.substr(slash) : "/";
    const bool has_port = host.find(':', host.find(']') + 1) != host.npos;  // from the front where there is no ]
    const bool https = url.compare(0, 8, "https://") == 0;                  // there is no TLS: no address, so that it fails at once
    dial_(https ? "" : has_port ? host : host + ":80", std::make_shared<HttpCall>(broker_, auth_request(session, host, path), done));
  }

  /// An answer without a ttl, with an unknown permission or a broken pattern is as good as none.
  std::shared_ptr<AuthGrant> parse_grant(const std::string& body) const {
    JsonParser parser{body};
    const Json json = parser.parse();
    const int64_t ttl = member_of(json, "ttl").integer().value_or(0);
    if (!parser.error.empty() || ttl <= 0) return nullptr;
    auto grant = std::make_shared<AuthGrant>();
    grant->expires = saturating_add(broker_.now.steady, std::min(ttl, kNever / kSecond) * kSecond);
    grant->identity = member_of(json, "identity").string;
    grant->identity_url = member_of(json, "identity_url").string;
    for (const Json& item : member_of(json, "authorizations").items) {
      AuthGrant::Authorization authorization{Pattern(member_of(item, "topic").string)};
      bool good = authorization.topic.valid();
      for (const Json& channel : member_of(item, "channels").items) {
        authorization.channels.emplace_back(channel.string);
        good = good && authorization.channels.back().valid();
      }
      for (const Json& permission : member_of(item, "permissions").items) {
        bool& granted = permission.string == "publish" ? authorization.publish : authorization.subscribe;
        granted = true;
        good = good && (permission.string == "publish" || permission.string == "subscribe");
      }
      if (!good) return nullptr;
      grant->authorizations.push_back(std::move(authorization));
    }
    return grant;
  }

  Broker& broker_;
  Dial dial_;
  LookupPeer::Identity identity_;
  std::map<std::string, std::unique_ptr<LookupPeer>> peers_;
  std::map<std::string, LookUp> look_ups_;
};

// ---------------------------------------------------------------------------------------------------------------------
// [14] The poll loop
//
// The only part with sockets and clocks. It owns the connections, feeds what arrives to their sessions and writes what these
// have appended. Nothing here blocks but poll(2) itself.
// Always: pollfd i belongs to entry i; a connection that is to be closed gets no more calls and goes at the end of the turn.
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

  std::string ip() const {
    std::array<char, INET6_ADDRSTRLEN> shown{};
    if (storage.ss_family == AF_INET) ::inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in&>(storage).sin_addr, shown.data(), shown.size());
    if (storage.ss_family != AF_INET6) return shown.data();
    const auto& v6 = reinterpret_cast<const sockaddr_in6&>(storage);
    if (IN6_IS_ADDR_V4MAPPED(&v6.sin6_addr)) ::inet_ntop(AF_INET, &v6.sin6_addr.s6_addr[12], shown.data(), shown.size());
    else ::inet_ntop(AF_INET6, &v6.sin6_addr, shown.data(), shown.size());
    return shown.data();
  }
  int port() const {
    if (storage.ss_family == AF_INET) return ntohs(reinterpret_cast<const sockaddr_in&>(storage).sin_port);
    return storage.ss_family == AF_INET6 ? ntohs(reinterpret_cast<const sockaddr_in6&>(storage).sin6_port) : -1;
  }
  /// As nsqd shows it: ip:port, [ip]:port, or @ on a Unix socket.
  std::string text() const {
    if (storage.ss_family != AF_INET && storage.ss_family != AF_INET6) return "@";
    const std::string host = ip();
    return detail::text(host.find(':') == host.npos ? host : "[" + host + "]", ":", port());
  }
};

/// The addresses that a host and port stand for. This may ask a name server, so never on the loop's thread.
inline std::vector<SocketAddress> resolve(const std::string& host, const std::string& port, int type, bool passive, std::string& why) {
  std::vector<SocketAddress> found;
  const auto number = decimal(port);
  if (!number || *number > 65535) return why = detail::text("invalid port \"", port, "\""), found;
  addrinfo hints{};
  hints.ai_socktype = type;
  hints.ai_flags = passive ? AI_PASSIVE : 0;
  addrinfo* list = nullptr;
  const int code = ::getaddrinfo(host.empty() ? nullptr : host.c_str(), port.c_str(), &hints, &list);
  if (code != 0) return why = detail::text("lookup ", host, ": ", ::gai_strerror(code)), found;
  for (const addrinfo* item = list; item != nullptr; item = item->ai_next) {
    found.emplace_back();
    std::memcpy(&found.back().storage, item->ai_addr, item->ai_addrlen);
    found.back().size = item->ai_addrlen;
  }
  ::freeaddrinfo(list);
  if (passive && host.empty())  // all interfaces: a socket for IPv6 takes IPv4, too
    std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.storage.ss_family == AF_INET6 && b.storage.ss_family != AF_INET6; });
  return found;
}

/// A socket that listens. Its destructor removes the file of a Unix socket.
class Listener {
 public:
  Listener(std::string kind_name, const std::string& listen_address) : kind(std::move(kind_name)) {
    const auto split = split_address(listen_address);
    if (split) listen_on_port(listen_address, *split);
    else listen_on_path(listen_address);
    ::fcntl(fd.get(), F_SETFL, O_NONBLOCK);
    address.size = sizeof address.storage;
    ::getsockname(fd.get(), address.get(), &address.size);
  }
  ~Listener() {
    if (!path.empty()) ::unlink(path.c_str());
  }
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  std::string shown() const { return path.empty() ? address.text() : path; }

  const std::string kind;  // TCP or HTTP
  Fd fd;
  SocketAddress address;
  std::string path;  // of a Unix socket
  std::function<std::shared_ptr<Session>(const SocketAddress& peer)> greet;

 private:
  [[noreturn]] static void refuse(const std::string& listen_address, std::string_view why) {
    throw std::runtime_error(text("listen (", listen_address, ") failed - ", why));
  }
  void listen_on_port(const std::string& listen_address, const std::pair<std::string, std::string>& split) {
    std::string why;
    for (SocketAddress& candidate : resolve(split.first, split.second, SOCK_STREAM, true, why)) {
      fd = Fd(::socket(candidate.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
      const int yes = 1, no = 0;
      ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
      if (split.first.empty() && candidate.storage.ss_family == AF_INET6) ::setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no);
      if (fd && ::bind(fd.get(), candidate.get(), candidate.size) == 0 && ::listen(fd.get(), kBacklog) == 0) return;
      why = text("bind: ", lower(std::strerror(errno)));
      if (errno == EADDRINUSE)
        why += text("; another program listens there, perhaps another nsqd: stop that one, or choose another address (port 0 takes any free one)");
    }
    refuse(listen_address, why);
  }
  void listen_on_path(const std::string& listen_address) {
    sockaddr_un local{};
    local.sun_family = AF_UNIX;
    if (listen_address.size() >= sizeof local.sun_path) refuse(listen_address, "the path of a unix socket must be shorter");
    listen_address.copy(local.sun_path, sizeof local.sun_path - 1);
    const auto* name = reinterpret_cast<const sockaddr*>(&local);
    remove_stale(listen_address, name, sizeof local);
    fd = Fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!fd || ::bind(fd.get(), name, sizeof local) != 0) refuse(listen_address, text("bind: ", lower(std::strerror(errno))));
    path = listen_address;
    ::chmod(path.c_str(), 0660);  // the user and the group of the daemon
    if (::listen(fd.get(), kBacklog) != 0) refuse(listen_address, text("listen: ", lower(std::strerror(errno))));
  }
  /// A socket file that nobody listens on any more was left by a process that was killed.
  static void remove_stale(const std::string& file, const sockaddr* name, socklen_t size) {
    struct stat about {};
    if (::lstat(file.c_str(), &about) != 0 || !S_ISSOCK(about.st_mode)) return;
    const Fd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (::connect(probe.get(), name, size) != 0 && errno == ECONNREFUSED) ::unlink(file.c_str());
  }
  static constexpr int kBacklog = 1024;
};

/// A thread for what would block the loop: fsync, and asking for the addresses of names. Jobs run one after the other.
class Worker {
 public:
  Worker() : thread_([this] { run(); }) {}
  ~Worker() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ending_ = true;
    }
    wake_.notify_one();
    thread_.join();
  }
  void post(std::function<void()> job) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      jobs_.push_back(std::move(job));
    }
    wake_.notify_one();
  }
  /// Runs a job behind all that were posted before, and waits for it.
  void run_and_wait(const std::function<void()>& job) {
    std::promise<void> done;
    post([&] {
      job();
      done.set_value();
    });
    done.get_future().wait();
  }

 private:
  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return ending_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      const auto job = std::move(jobs_.front());
      jobs_.pop_front();
      lock.unlock();
      job();
      lock.lock();
    }
  }
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> jobs_;
  bool ending_ = false;
  std::thread thread_;
};

/// Sends each packet once; what the network does not take is lost, as UDP has it.
inline void send_datagrams(SocketAddress& to, const std::vector<std::string>& packets) {
  const Fd fd(::socket(to.storage.ss_family, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  for (const std::string& packet : packets) ::sendto(fd.get(), packet.data(), packet.size(), MSG_NOSIGNAL | MSG_DONTWAIT, to.get(), to.size);
}

class Loop {
 public:
  explicit Loop(Broker& broker) : broker_(broker), accept_again_(broker.timers, [this] { resume_listeners(); }), shared_input_(kReadSize, '\0') {
    std::array<int, 2> ends{};
    if (::pipe(ends.data()) != 0) throw std::runtime_error(system_error("create", "pipe").error);
    wake_read_ = Fd(ends[0]);
    wake_write_ = Fd(ends[1]);
    for (int end : ends) {
      ::fcntl(end, F_SETFL, O_NONBLOCK);
      ::fcntl(end, F_SETFD, FD_CLOEXEC);
    }
    fds_.push_back({wake_read_.get(), POLLIN, 0});
    entries_.push_back(nullptr);
    rlimit limit{};
    ::getrlimit(RLIMIT_NOFILE, &limit);
    descriptors_ = static_cast<size_t>(limit.rlim_cur);
    spare_descriptors_ = std::min<size_t>(64, descriptors_ / 2);
    read_clocks();
  }
  ~Loop() { close_connections(); }

  /// Runs a task on the loop's thread, in its next turn. From any thread.
  void post(std::function<void()> task) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (over_) return;
    if (tasks_.empty()) [[maybe_unused]] const ssize_t written = ::write(wake_write_.get(), "", 1);
    tasks_.push_back(std::move(task));
  }
  /// The last call on the loop's thread: tasks that were not run never will be.
  void close_tasks() {
    std::vector<std::function<void()>> dropped;
    const std::lock_guard<std::mutex> lock(mutex_);
    over_ = true;
    dropped.swap(tasks_);
  }

  void listen(std::unique_ptr<Listener> listener) {
    fds_.insert(fds_.begin() + 1 + static_cast<std::ptrdiff_t>(listeners_.size()), pollfd{listener->fd.get(), POLLIN, 0});
    entries_.insert(entries_.begin() + 1 + static_cast<std::ptrdiff_t>(listeners_.size()), nullptr);
    listeners_.push_back(std::move(listener));
    hot_end_ = 1 + listeners_.size();
  }
  void close_listeners(std::string_view kind) {
    for (size_t i = listeners_.size(); i-- > 0;) {
      if (listeners_[i]->kind != kind) continue;
      broker_.logger.say(Level::kInfo, kind, ": closing ", listeners_[i]->shown());
      listeners_.erase(listeners_.begin() + static_cast<std::ptrdiff_t>(i));
      fds_.erase(fds_.begin() + 1 + static_cast<std::ptrdiff_t>(i));
      entries_.erase(entries_.begin() + 1 + static_cast<std::ptrdiff_t>(i));
      --hot_end_;
      for (size_t at = 1 + i; at < entries_.size(); ++at)
        if (entries_[at] != nullptr) entries_[at]->slot = at;
    }
  }
  void close_connections() {
    while (!all_.empty()) destroy(all_.begin()->first);
  }

  /// Takes a session that has no socket: its drained() is called when it has something to take.
  void adopt(std::shared_ptr<Session> session) { add(Fd(), std::move(session)); }

  /// Connects to host:port; connected() or ended() of the session is called, later.
  void dial(const std::string& address, std::shared_ptr<Session> session, Worker& worker) {
    const auto split = split_address(address);
    Connection* connection = add(Fd(), std::move(session));
    if (!split) return fail(connection);
    worker.post([this, split = *split, watched = std::weak_ptr<Session>(connection->session)] {
      std::string why;
      auto addresses = resolve(split.first, split.second, SOCK_STREAM, false, why);
      post([this, watched, addresses = std::move(addresses)]() mutable {
        const auto found = watched.lock();
        Connection* waiting = found == nullptr ? nullptr : connection_of(*found);
        if (waiting != nullptr) connect(waiting, addresses);
      });
    });
  }

  /// One turn. `store` makes durable what the turn has changed: nothing is written to a client before that.
  template <typename Store>
  void turn(Store&& store) {
    wait();
    run_tasks();
    accept_new();
    read_ready();
    broker_.timers.run(broker_.now.steady);
    feed_attended();
    broker_.pump();
    store();
    write_attended();
    broker_.after_write();
    destroy_closed();
  }

  void read_clocks() {
    auto read = [](clockid_t clock) {
      timespec now{};
      ::clock_gettime(clock, &now);
      return static_cast<int64_t>(now.tv_sec) * kSecond + now.tv_nsec;
    };
    broker_.now = {read(CLOCK_MONOTONIC), read(CLOCK_REALTIME)};
  }
  const std::vector<std::unique_ptr<Listener>>& listeners() const { return listeners_; }
  template <typename Visit>
  void each_session(Visit&& visit) const {
    for (const auto& [connection, owned] : all_) visit(*connection->session);
  }
  size_t connections() const { return all_.size(); }

 private:
  static constexpr size_t kReadSize = size_t{1} << 17;     // bytes per read
  static constexpr size_t kMostUnread = size_t{4} << 20;   // of output: above it the client is not read from
  static constexpr int64_t kLinger = 2 * kSecond;          // for a client to read its last error before the connection goes
  static constexpr size_t kFewIdle = 64;                   // that it does no harm to look at each time

  struct Silence : Session {  // in the place of a session that has ended
    size_t feed(std::string_view input) override { return input.size(); }
    void ended(std::string_view) override {}
  };
  struct Connection {
    Fd fd;
    std::shared_ptr<Session> session;
    std::string input = {};      // what has arrived and is not done with
    size_t slot = 0;             // of its pollfd; 0: none
    int64_t active = 0;          // when something arrived last
    bool connecting = false, attended = false, ended = false, closed = false;
    std::unique_ptr<Timer> lingering = {};
  };
  // ---- waiting ---------------------------------------------------------------------------------------------------------

  /// Sleeps until a socket is ready or a timer is due. poll(2) costs time for each descriptor that it looks at, so while some
  /// connections are busy and many are not, it looks at the busy ones, and at all of them in a tenth of the time only.
  void wait() {
    const bool many_idle = fds_.size() - hot_end_ > kFewIdle && hot_end_ > 1 + listeners_.size();
    if (!many_idle || broker_.now.steady >= next_look_ || !poll(hot_end_, next_look_)) {
      const int64_t begun = broker_.now.steady;
      poll(fds_.size(), many_idle ? 0 : kNever);
      const int64_t pause = std::clamp(9 * (broker_.now.steady - begun), kMillisecond, 20 * kMillisecond);
      if (many_idle) next_look_ = broker_.now.steady + pause;
      cool_down(5 * pause);
    }
  }

  /// Waits for one of the first `count` descriptors until `until`, or the next timer if that is sooner.
  bool poll(size_t count, int64_t until) {
    const int64_t left = std::min(until, broker_.timers.next()) - broker_.now.steady;
    const bool work = !attended_.empty() || broker_.has_work();
    const int64_t ms = std::min<int64_t>((std::max<int64_t>(left, 0) + kMillisecond - 1) / kMillisecond, 3600 * 1000);
    polled_ = count;
    ready_ = ::poll(fds_.data(), count, work ? 0 : until == kNever && broker_.timers.next() == kNever ? -1 : static_cast<int>(ms));
    read_clocks();
    return ready_ > 0;
  }

  void swap_slots(size_t a, size_t b) {
    if (a == b) return;
    std::swap(fds_[a], fds_[b]);
    std::swap(entries_[a], entries_[b]);
    entries_[a]->slot = a;
    entries_[b]->slot = b;
  }
  /// Something has arrived; twice within a moment makes a connection a busy one.
  void warm_up(Connection* connection) {
    const bool again = broker_.now.steady - std::exchange(connection->active, broker_.now.steady) < 5 * kMillisecond;
    if (again && connection->slot >= hot_end_) swap_slots(connection->slot, hot_end_++);
  }
  void cool_down(int64_t after) {
    for (size_t i = hot_end_; i-- > 1 + listeners_.size();)
      if (broker_.now.steady - entries_[i]->active > after) swap_slots(i, --hot_end_);
  }

  // ---- connections -----------------------------------------------------------------------------------------------------

  Connection* add(Fd fd, std::shared_ptr<Session> session) {
    auto made = std::make_unique<Connection>();
    Connection* connection = made.get();
    connection->fd = std::move(fd);
    connection->session = std::move(session);
    connection->session->port.attend = [this, connection] { attend(connection); };
    all_.emplace(connection, std::move(made));
    if (connection->fd) enlist(connection);
    return connection;
  }
  void enlist(Connection* connection) {
    connection->slot = fds_.size();
    fds_.push_back({connection->fd.get(), POLLIN, 0});
    entries_.push_back(connection);
  }
  Connection* connection_of(const Session& session) const {
    for (const auto& [connection, owned] : all_)
      if (connection->session.get() == &session) return connection;
    return nullptr;
  }
  void attend(Connection* connection) {
    if (connection->attended) return;
    connection->attended = true;
    attended_.push_back(connection);
  }
  void destroy(Connection* connection) {
    if (connection->slot != 0) {
      if (connection->slot < hot_end_) {
        swap_slots(connection->slot, hot_end_ - 1);
        --hot_end_;
      }
      swap_slots(connection->slot, fds_.size() - 1);
      fds_.pop_back();
      entries_.pop_back();
    }
    connection->session->port.attend = [] {};
    attended_.erase(std::remove(attended_.begin(), attended_.end(), connection), attended_.end());
    const auto gone = std::move(all_.find(connection)->second);
    all_.erase(connection);
    if (listeners_paused_) resume_listeners();
  }

  void accept_new() {
    if (ready_ <= 0) return;
    for (size_t i = 0; i < listeners_.size(); ++i) {
      if ((fds_[1 + i].revents & POLLIN) == 0) continue;
      for (int most = 64; most > 0; --most) {
        if (all_.size() + spare_descriptors_ >= descriptors_) return pause_listeners(EMFILE);
        SocketAddress peer;
        Fd fd(::accept(listeners_[i]->fd.get(), peer.get(), &peer.size));
        if (!fd) {
          if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) pause_listeners(errno);
          if (errno != ECONNABORTED && errno != EINTR) break;
          continue;
        }
        const int yes = 1;
        ::fcntl(fd.get(), F_SETFD, FD_CLOEXEC);
        ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);  // fails on a Unix socket, where nothing is delayed
        add(std::move(fd), listeners_[i]->greet(peer));
      }
    }
  }
  /// Out of descriptors: those who are here go on, and the next ones wait in the kernel's queue until there is room.
  void pause_listeners(int why) {
    if (!listeners_paused_) broker_.logger.say(Level::kWarning, "no more clients until one leaves - ", system_error("accept", "", why).error);
    listeners_paused_ = true;
    for (size_t i = 0; i < listeners_.size(); ++i) fds_[1 + i].events = 0;
    accept_again_.set(broker_.now.steady + kSecond);
  }
  void resume_listeners() {
    listeners_paused_ = false;
    for (size_t i = 0; i < listeners_.size(); ++i) fds_[1 + i].events = POLLIN;
  }

  void fail(Connection* connection) {
    connection->closed = true;
    attend(connection);
    connection->session->ended({});
  }
  void connect(Connection* connection, std::vector<SocketAddress>& addresses) {
    if (connection->closed) return;
    for (SocketAddress& address : addresses) {
      Fd fd(::socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
      if (!fd || (::connect(fd.get(), address.get(), address.size) != 0 && errno != EINPROGRESS)) continue;
      connection->fd = std::move(fd);
      connection->connecting = true;
      enlist(connection);
      fds_[connection->slot].events = POLLOUT;
      return;
    }
    fail(connection);
  }
  void finish_connecting(Connection* connection) {
    int code = 0;
    socklen_t size = sizeof code;
    ::getsockopt(connection->fd.get(), SOL_SOCKET, SO_ERROR, &code, &size);
    if (code != 0) return fail(connection);
    connection->connecting = false;
    fds_[connection->slot].events = POLLIN;
    connection->session->connected();
  }

  // ---- reading ---------------------------------------------------------------------------------------------------------

  void read_ready() {
    if (ready_ <= 0) return;
    ready_list_.clear();
    for (size_t i = 1 + listeners_.size(); i < std::min(polled_, fds_.size()); ++i)
      if (fds_[i].revents != 0) ready_list_.push_back({entries_[i], std::exchange(fds_[i].revents, short{0})});
    for (const auto& ready : ready_list_) {
      Connection* connection = ready.first;
      const short events = ready.second;
      warm_up(connection);
      if (connection->closed) continue;
      if (connection->connecting) finish_connecting(connection);
      else if ((events & POLLIN) != 0) guard(connection, [&] { read(connection); });
      else if ((events & (POLLERR | POLLHUP | POLLNVAL)) != 0) lose(connection);
      if ((events & POLLOUT) != 0) attend(connection);
    }
  }
  /// Where there is no memory for a connection, the connection ends and not the daemon.
  template <typename Action>
  void guard(Connection* connection, Action&& action) {
    try {
      action();
    } catch (const std::bad_alloc&) {
      broker_.logger.say(Level::kError, "out of memory: a connection is closed");
      std::string().swap(connection->input);
      connection->session->port.dropped = true;
      attend(connection);
    }
  }
  void lose(Connection* connection) {
    connection->session->port.dropped = true;
    connection->session->ended({});
    attend(connection);
  }

  /// Reads once. What the session has not done with is kept; a buffer grows with what has arrived, never ahead of it.
  void read(Connection* connection) {
    std::string& kept = connection->input;
    const bool fresh = kept.empty();
    const size_t before = kept.size();
    if (!fresh) kept.resize(before + std::clamp(before, size_t{4096}, kReadSize));
    char* into = fresh ? shared_input_.data() : kept.data() + before;
    const ssize_t got = ::recv(connection->fd.get(), into, fresh ? kReadSize : kept.size() - before, MSG_DONTWAIT);
    if (!fresh) kept.resize(before + static_cast<size_t>(std::max<ssize_t>(got, 0)));
    if (got < 0) {
      if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) lose(connection);
      return;
    }
    if (connection->lingering != nullptr) {  // only its end is waited for
      kept.clear();
      if (got == 0) connection->closed = true, attend(connection);
      return;
    }
    if (got == 0) connection->ended = true;
    feed(connection, fresh ? std::string_view(shared_input_.data(), static_cast<size_t>(got)) : std::string_view(kept));
  }

  void feed(Connection* connection, std::string_view arrived) {
    Session& session = *connection->session;
    std::string& kept = connection->input;
    size_t used = 0;
    if (!session.parked && !session.port.closing && !session.port.dropped) used = session.feed(arrived);
    if (!session.parked && !session.port.closing && (connection->ended || session.late)) {
      session.ended(arrived.substr(used));
      used = arrived.size();
    }
    if (session.port.closing || session.port.dropped) used = arrived.size();
    if (used == arrived.size()) std::string().swap(kept);
    else if (arrived.data() == kept.data()) kept.erase(0, used);
    else kept.assign(arrived.substr(used));
    if (connection->ended || session.port.closing || session.port.dropped) attend(connection);
  }

  /// Sessions that were woken by something else than input: an answer that they waited for, or their time being up.
  void feed_attended() {
    for (size_t i = 0; i < attended_.size(); ++i) {
      Connection* connection = attended_[i];
      Session& session = *connection->session;
      if (session.parked || connection->closed || session.port.closing || session.port.dropped) continue;
      if (connection->connecting || connection->lingering != nullptr) continue;
      if (session.late || session.resumed || connection->ended) {
        session.resumed = false;
        const std::string kept = std::move(connection->input);
        connection->input.clear();
        feed(connection, kept);
      }
    }
  }

  // ---- writing ---------------------------------------------------------------------------------------------------------

  void write_attended() {
    writing_.swap(attended_);
    for (Connection* connection : writing_) {
      connection->attended = false;
      if (connection->session->port.dropped && !std::exchange(connection->closed, true) && !connection->fd) connection->session->ended({});
      if (!connection->closed) guard(connection, [&] { write(connection); });
      if (connection->closed) closed_.push_back(connection);
    }
    writing_.clear();
  }

  void write(Connection* connection) {
    Port& port = connection->session->port;
    if (!connection->fd) return connection->session->drained();  // inside the process, or not connected yet
    if (connection->connecting) return;
    if (!port.out.empty()) {
      std::array<iovec, 256> pieces;
      msghdr message{};
      message.msg_iov = pieces.data();
      message.msg_iovlen = port.out.gather(pieces.data(), pieces.size());
      const ssize_t sent = ::sendmsg(connection->fd.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (sent < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR && errno != ENOBUFS) {
        port.out.clear();
        connection->session->ended({});
        return void(connection->closed = true);
      }
      port.out.settle(static_cast<size_t>(std::max<ssize_t>(sent, 0)));
      connection->session->written += static_cast<uint64_t>(std::max<ssize_t>(sent, 0));
      connection->session->drained();
    }
    if (port.closing && port.out.empty() && connection->lingering == nullptr) return finish(connection);
    const bool hears = !connection->ended && port.out.size() < kMostUnread;
    fds_[connection->slot].events = static_cast<short>((hears ? POLLIN : 0) | (port.out.empty() ? 0 : POLLOUT));
  }

  /// Everything is said. A socket that is closed with input unread would be reset, and the client might never see its error:
  /// so only our side is closed, and the rest of what the client sends is thrown away for a moment.
  void finish(Connection* connection) {
    if (connection->ended || ::shutdown(connection->fd.get(), SHUT_WR) != 0) return void(connection->closed = true);
    connection->session->port.attend = [] {};
    connection->session = std::make_shared<Silence>();
    fds_[connection->slot].events = POLLIN;
    connection->lingering = std::make_unique<Timer>(broker_.timers, [this, connection] { connection->closed = true, attend(connection); });
    connection->lingering->set(broker_.now.steady + kLinger);
  }

  void destroy_closed() {
    for (size_t i = 0; i < closed_.size(); ++i)  // a session that goes may end others
      if (all_.find(closed_[i]) != all_.end()) destroy(closed_[i]);
    closed_.clear();
  }

  void run_tasks() {
    if (ready_ <= 0 || fds_[0].revents == 0) return;
    std::array<char, 64> bytes;
    while (::read(wake_read_.get(), bytes.data(), bytes.size()) > 0) {
    }
    std::vector<std::function<void()>> tasks;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      tasks.swap(tasks_);
    }
    for (auto& task : tasks) task();
  }

  Broker& broker_;
  Timer accept_again_;
  bool listeners_paused_ = false;
  size_t descriptors_ = 0, spare_descriptors_ = 0;  // as many as there may be, and those kept back for files and peers
  std::string shared_input_;
  Fd wake_read_, wake_write_;
  std::vector<std::unique_ptr<Listener>> listeners_;
  std::map<Connection*, std::unique_ptr<Connection>> all_;
  std::vector<pollfd> fds_;  // the wake-up pipe, the listeners, the busy connections, and from hot_end_ on the idle ones
  std::vector<Connection*> entries_;
  size_t hot_end_ = 1;
  size_t polled_ = 0;  // descriptors that the last poll looked at
  int ready_ = 0;      // and those that it found
  int64_t next_look_ = 0;  // at all descriptors, while some are busy
  std::vector<std::pair<Connection*, short>> ready_list_;
  std::vector<Connection*> attended_, writing_, closed_;
  std::mutex mutex_;
  std::vector<std::function<void()>> tasks_;
  bool over_ = false;  // no task is run any more
};

// ---------------------------------------------------------------------------------------------------------------------
// [15] The daemon
//
// Joins the parts: what is locked, bound and loaded at the start, what a turn makes durable, and in which order all of it
// ends. And the consumers and publishers inside the process, who reach the loop by posting tasks to it.
// Always: everything but post() and the ports is touched by the loop's thread only, from start to the end of stop.
// ---------------------------------------------------------------------------------------------------------------------

/// A consumer inside the process: a session without a socket, whose output is taken apart into messages.
struct LocalConsumer : Session {
  size_t feed(std::string_view input) override { return input.size(); }
  void ended(std::string_view) override { close(); }
  /// On the loop's thread: passes on what the channel has delivered.
  void drained() override {
    iovec piece{};
    std::string bytes;
    while (port.out.gather(&piece, 1) > 0) {
      bytes.append(static_cast<const char*>(piece.iov_base), piece.iov_len);
      port.out.settle(piece.iov_len);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t at = 0; at < bytes.size(); at += Segment::frame_size(&bytes[at])) {
      const char* frame = &bytes[at];
      messages.push_back({std::string(frame + 18, 16), std::string(frame + Segment::kFrameHead, Segment::frame_size(frame) - Segment::kFrameHead),
                          static_cast<int64_t>(get_be<uint64_t>(frame + 8)), get_be<uint16_t>(frame + 16)});
    }
    wake.notify_all();
  }
  void close() {
    const std::lock_guard<std::mutex> lock(mutex);
    closed = true;
    wake.notify_all();
  }
  bool is_closed() {
    const std::lock_guard<std::mutex> lock(mutex);
    return closed;
  }
  /// From any thread: does something with a message in flight, and tells whether that was possible.
  template <typename Action>
  bool answer(const Message& message, Action&& action);

  ClientInfo info;
  Engine* engine = nullptr;
  std::mutex mutex;
  std::condition_variable wake;
  std::deque<Message> messages;
  bool closed = false;
};

/// Refuses settings that cannot work, and fills in those that depend on the host.
inline void complete_options(Options& options);

class Engine {
 public:
  explicit Engine(Options given)
      : options_(completed(std::move(given))), logger_(options_), lock_(lock()), broker_(options_, logger_, options_.mem_only ? std::string() : data_path()), host_(broker_), loop_(broker_),
        cluster_(broker_, [this](const std::string& address, std::shared_ptr<Session> session) { loop_.dial(address, std::move(session), *worker_); }),
        sync_timer_(broker_.timers, [this] { sync_due_ = true; }), statsd_timer_(broker_.timers, [this] { push_statsd(); }) {
    logger_.say(Level::kInfo, build_text());
    logger_.say(Level::kInfo, "ID: ", options_.node_id);
    connect_host();
    listen();
    if (!options_.mem_only) recover();
  }
  ~Engine() { stop(); }

  void start() {
    worker_ = std::make_unique<Worker>();
    for (const auto& listener : loop_.listeners()) logger_.say(Level::kInfo, listener->kind, ": listening on ", listener->shown());
    broker_.on_change = [this](const Topic& topic, const Channel* channel, bool created) { cluster_.tell(topic, channel, created); };
    thread_ = std::thread([this] { run(); });
  }

  /// The order of the end. Called once; from the caller's thread, which waits for the loop.
  void stop() {
    if (thread_.joinable()) {
      loop_.post([this] { ending_ = true; });
      thread_.join();
      logger_.say(Level::kInfo, "NSQ: stopping subsystems");
      worker_.reset();
      lock_.reset();
      logger_.say(Level::kInfo, "NSQ: bye");
    }
  }

  int tcp_port() const { return tcp_port_; }
  int http_port() const { return http_port_; }

  /// Runs a task on the loop's thread and waits until its turn is over, so that what it has changed is as durable as the
  /// options ask for. Throws std::runtime_error when the daemon does not run.
  template <typename Task>
  auto on_loop(Task&& task) {
    using Result = decltype(task());
    auto done = std::make_shared<std::promise<Result>>();
    auto result = done->get_future();
    loop_.post([this, task = std::forward<Task>(task), done = std::move(done)]() mutable {
      if constexpr (std::is_void_v<Result>) {
        task();
        after_turn_.push_back([done] { done->set_value(); });
      } else {
        after_turn_.push_back([done, value = task()]() mutable { done->set_value(std::move(value)); });
      }
    });
    try {
      return result.get();
    } catch (const std::future_error&) {  // the task was thrown away
      throw std::runtime_error("the daemon is not running");
    }
  }
  template <typename Action>
  bool with_topic(std::string_view topic, Action&& action) {
    return on_loop([this, topic, action] {
      Topic* found = broker_.find(topic);
      if (found != nullptr) action(*found);
      return found != nullptr;
    });
  }
  template <typename Action>
  bool with_channel(std::string_view topic, std::string_view channel, Action&& action) {
    return on_loop([this, topic, channel, action] {
      Topic* parent = broker_.find(topic);
      Channel* found = parent == nullptr ? nullptr : parent->find(channel);
      if (found != nullptr) action(*found);
      return found != nullptr;
    });
  }
  static void check_name(std::string_view name) {
    if (!valid_name(name)) throw std::invalid_argument(text("invalid name ", quoted(name), ": 1 to 64 of . _ - and letters and digits, optionally #ephemeral at the end"));
  }
  void publish(std::string_view topic, const std::string_view* bodies, size_t count, Duration delay);
  Broker& broker() { return broker_; }
  Stats stats() { return take_stats(host_, {}); }

  std::shared_ptr<LocalConsumer> subscribe(const std::string& topic, const std::string& channel, int max_in_flight);
  void unsubscribe(const std::shared_ptr<LocalConsumer>& consumer);

 private:
  static Options completed(Options options) {
    complete_options(options);
    return options;
  }
  std::string data_path() const { return options_.data_path.empty() ? "." : options_.data_path; }
  std::unique_ptr<DirectoryLock> lock() const { return options_.mem_only ? nullptr : std::make_unique<DirectoryLock>(data_path()); }

  // ---- the start -------------------------------------------------------------------------------------------------------

  void connect_host() {
    host_.started_wall = broker_.now.wall;
    host_.ask_auth = [this](V2Session& session) { cluster_.ask_auth(session); };
    host_.look_up = [this](std::string_view topic, Session& session) { return cluster_.look_up(topic, session); };
    host_.connections = [this] { return loop_.connections(); };
    host_.set_lookupds = [this](std::vector<std::string> addresses) {
      options_.lookupd_tcp_address = std::move(addresses);
      cluster_.set_peers(options_.lookupd_tcp_address);
    };
    host_.each_client = [this](const std::function<void(const V2Session&)>& visit) {
      loop_.each_session([&visit](const Session& session) {
        if (const auto* client = dynamic_cast<const V2Session*>(&session)) visit(*client);
      });
    };
  }

  void listen() {
    auto tcp = std::make_unique<Listener>("TCP", options_.tcp_address);
    tcp_port_ = tcp->address.port();
    tcp->greet = [this](const SocketAddress& peer) {
      logger_.say(Level::kInfo, "TCP: new client(", peer.text(), ")");
      return std::make_shared<V2Session>(host_, peer.text(), peer.ip());
    };
    loop_.listen(std::move(tcp));
    if (!options_.http_address.empty()) {
      auto http = std::make_unique<Listener>("HTTP", options_.http_address);
      http_port_ = http->address.port();
      http->greet = [this](const SocketAddress& peer) {
        return std::make_shared<HttpSession>(host_, options_, logger_, peer.text(), [this] { return std::make_pair(tcp_port_, http_port_); });
      };
      loop_.listen(std::move(http));
    }
    if (options_.broadcast_tcp_port == 0) options_.broadcast_tcp_port = tcp_port_;
    if (options_.broadcast_http_port == 0) options_.broadcast_http_port = http_port_;
    fill_in_statsd_prefix();
  }

  void fill_in_statsd_prefix() {
    std::string host = text(options_.broadcast_address, ":", options_.broadcast_http_port);
    for (char& c : host)
      if (c == '.' || c == ':') c = '_';
    std::string& prefix = options_.statsd_prefix;
    for (size_t at = prefix.find("%s"); at != prefix.npos; at = prefix.find("%s", at + host.size())) prefix.replace(at, 2, host);
    if (!prefix.empty() && prefix.back() != '.') prefix += '.';
  }

  void recover() {
    Recovery(broker_).run();
    const Status status = replace_file(data_path(), "nsqd.dat", metadata_to_write());
    if (!status.ok()) throw std::runtime_error(text("failed to persist metadata - ", status.error, " (--data-path must be a directory that can be written to)"));
    broker_.metadata_persisted = broker_.metadata_version;
  }

  // ---- the loop's thread -----------------------------------------------------------------------------------------------

  void run() {
    sigset_t mask;  // signals are for the program, but for those that say that this thread is broken
    ::sigfillset(&mask);
    for (int broken : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) ::sigdelset(&mask, broken);
    ::pthread_sigmask(SIG_BLOCK, &mask, nullptr);
    cluster_.start(static_cast<int>(options_.broadcast_tcp_port), static_cast<int>(options_.broadcast_http_port));
    if (!options_.statsd_address.empty()) statsd_timer_.set(broker_.now.steady + options_.statsd_interval.count());
    while (!ending_) loop_.turn([this] { make_durable(); });
    finish();
    loop_.close_tasks();
  }

  /// Before a turn's answers go out. Only what somebody waits for is waited for here; the worker does the rest.
  void make_durable() {
    Storage& storage = broker_.storage;
    if (options_.mem_only) broker_.metadata_changed = broker_.metadata_awaited = false;
    if (broker_.metadata_awaited) {
      Status status;
      worker_->run_and_wait([&status, json = metadata_to_write(), path = data_path()] { status = replace_file(path, "nsqd.dat", json); });
      note_metadata(status, broker_.metadata_version);
    } else if (broker_.metadata_changed && !writing_metadata_) {
      writing_metadata_ = true;
      worker_->post([this, json = metadata_to_write(), path = data_path(), version = broker_.metadata_version] {
        loop_.post([this, status = replace_file(path, "nsqd.dat", json), version] {
          writing_metadata_ = false;
          note_metadata(status, version);
        });
      });
    }
    if (!storage.dirty.empty() && options_.sync_every <= 1) sync_now();
    else if (!storage.dirty.empty() && !syncing_) consider_sync();
    for (auto& done : std::exchange(after_turn_, {})) done();
  }

  std::string metadata_to_write() {
    logger_.say(Level::kInfo, "NSQ: persisting topic/channel metadata to ", data_path(), "/nsqd.dat");
    broker_.metadata_changed = broker_.metadata_awaited = false;
    return broker_.metadata().json();
  }
  void note_metadata(const Status& status, uint64_t version) {
    if (status.ok()) broker_.metadata_persisted = version;
    else logger_.say(Level::kError, "failed to persist metadata - ", status.error);
  }

  /// Gives up when the daemon ends: what is not synced then is no more than what a power cut might have taken before.
  Status sync_files(const std::vector<std::string>& paths, const std::string& directory) const {
    Status status;
    for (auto path = paths.begin(); path != paths.end() && status.ok() && !over_; ++path) status = sync_path(*path);
    return status.ok() && !directory.empty() ? sync_path(directory) : status;
  }
  /// What has to be synced now; what is touched from here on belongs to the next time.
  std::pair<std::vector<std::string>, std::string> take_dirty() {
    Storage& storage = broker_.storage;
    ++storage.epoch;
    storage.operations = 0;
    sync_due_ = false;
    sync_timer_.set(kNever);
    return {std::exchange(storage.dirty, {}), std::exchange(storage.new_names, false) ? data_path() : std::string()};
  }
  void sync_now() {
    const auto [paths, directory] = take_dirty();
    worker_->run_and_wait([this, paths = paths, directory = directory] { broker_.storage.unsynced = sync_files(paths, directory).error; });
  }
  /// After --sync-every operations, or --sync-timeout after the first one. Where the disk is too slow for that, syncing takes
  /// a tenth of the time, so that it is the publishers who get the rest.
  void consider_sync() {
    const int64_t now = broker_.now.steady;
    const bool many = broker_.storage.operations >= static_cast<uint64_t>(options_.sync_every);
    if (sync_due_ || (many && now >= next_sync_)) return sync_later();
    const int64_t in_time = options_.sync_timeout.count() > 0 ? saturating_add(now, options_.sync_timeout.count()) : kNever;
    sync_timer_.set(std::min({sync_timer_.due(), in_time, many ? next_sync_ : kNever}));
  }
  void sync_later() {
    syncing_ = true;
    const auto [paths, directory] = take_dirty();
    worker_->post([this, paths = paths, directory = directory, begun = broker_.now.steady] {
      const Status status = sync_files(paths, directory);
      loop_.post([this, status, begun] {
        syncing_ = false;
        next_sync_ = broker_.now.steady + 9 * (broker_.now.steady - begun);
        if (!status.ok()) logger_.say(Level::kError, "failed to sync - ", status.error);
        broker_.storage.unsynced = status.error;
      });
    });
  }

  /// Listeners, clients, metadata, topics, subsystems: the order in which nsqd ends.
  void finish() {
    over_ = true;
    loop_.close_listeners("TCP");
    loop_.each_session([](Session& session) {
      auto* local = dynamic_cast<LocalConsumer*>(&session);
      if (local == nullptr) return;
      local->close();
      if (local->port.consumer != nullptr) local->port.consumer->channel.give_back(*local->port.consumer);
    });
    loop_.close_connections();
    loop_.close_listeners("HTTP");
    if (!options_.mem_only) worker_->run_and_wait([this, json = metadata_to_write()] { note_metadata(replace_file(data_path(), "nsqd.dat", json), broker_.metadata_version); });
    logger_.say(Level::kInfo, "NSQ: closing topics");
    broker_.close();
    if (!options_.lookupd_tcp_address.empty()) logger_.say(Level::kInfo, "LOOKUP: closing");
    broker_.on_change = nullptr;
    cluster_.stop();
    if (!options_.statsd_address.empty()) logger_.say(Level::kInfo, "STATSD: closing");
    statsd_timer_.set(kNever);
  }

  void push_statsd() {
    statsd_timer_.set(broker_.now.steady + options_.statsd_interval.count());
    const auto split = split_address(options_.statsd_address);
    if (!split) return;
    StatsQuery query;
    query.include_clients = false;
    worker_->post([this, split = *split, packets = statsd_.packets(take_stats(host_, query), options_, options_.statsd_prefix)] {
      std::string why;
      auto addresses = resolve(split.first, split.second, SOCK_DGRAM, false, why);
      if (addresses.empty()) return loop_.post([this, why] { logger_.say(Level::kError, "STATSD: ", why); });
      send_datagrams(addresses.front(), packets);
    });
  }

  Options options_;
  Logger logger_;
  std::unique_ptr<DirectoryLock> lock_;
  Broker broker_;
  Host host_;
  std::unique_ptr<Worker> worker_;
  Loop loop_;
  Cluster cluster_;
  StatsdFeed statsd_;
  Timer sync_timer_, statsd_timer_;
  int tcp_port_ = 0, http_port_ = 0;
  bool ending_ = false;
  std::atomic<bool> over_{false};  // for the worker: do not begin another fsync
  int64_t next_sync_ = 0;  // not before that time
  bool writing_metadata_ = false, syncing_ = false, sync_due_ = false;
  std::vector<std::function<void()>> after_turn_;
  std::thread thread_;
};

inline void Engine::publish(std::string_view topic, const std::string_view* bodies, size_t count, Duration delay) {
  check_name(topic);
  for (size_t i = 0; i < count; ++i)
    if (bodies[i].empty() || bodies[i].size() > static_cast<size_t>(options_.max_msg_size))
      throw std::invalid_argument(text("a message has 1 to ", options_.max_msg_size, " bytes, not ", bodies[i].size()));
  if (delay < Duration::zero() || delay > options_.max_req_timeout) throw std::invalid_argument("a delay is from 0 to max_req_timeout");
  const std::string why = on_loop([this, topic, bodies, count, delay] { return broker_.topic(topic).publish(bodies, count, delay.count()).error; });
  if (!why.empty()) throw std::runtime_error(why);
}

template <typename Action>
bool LocalConsumer::answer(const Message& message, Action&& action) {
  if (message.id.size() != 16 || is_closed()) return false;
  return engine->on_loop([this, &message, &action] { return port.consumer != nullptr && action(*port.consumer, MessageId::from(message.id.data())).empty(); });
}

inline std::shared_ptr<LocalConsumer> Engine::subscribe(const std::string& topic, const std::string& channel, int max_in_flight) {
  check_name(topic);
  check_name(channel);
  auto consumer = std::make_shared<LocalConsumer>();
  consumer->engine = this;
  consumer->port.session = consumer.get();
  consumer->info.client_id = consumer->info.hostname = host_name();
  consumer->info.address = "@";
  const std::string why = on_loop([this, consumer, topic, channel, max_in_flight] {
    Status status;
    Channel* found = broker_.topic(topic).channel(channel, status);
    if (found == nullptr) return status.error;
    loop_.adopt(consumer);
    found->set_ready(found->subscribe(consumer->port, consumer->info, options_.msg_timeout, 0), max_in_flight);
    return std::string();
  });
  if (!why.empty()) throw std::runtime_error(why);
  return consumer;
}

inline void Engine::unsubscribe(const std::shared_ptr<LocalConsumer>& consumer) {
  on_loop([consumer] {
    if (consumer->port.consumer != nullptr) consumer->port.consumer->channel.give_back(*consumer->port.consumer);
    consumer->port.dropped = true;
    consumer->port.attend();
  });
}

}  // namespace nsqd::detail

namespace nsqd {

inline Subscription::Subscription(Subscription&&) noexcept = default;
inline Subscription& Subscription::operator=(Subscription&& other) noexcept {
  std::swap(consumer_, other.consumer_);
  return *this;
}
inline Subscription::~Subscription() {
  if (consumer_ != nullptr && !consumer_->is_closed()) consumer_->engine->unsubscribe(consumer_);
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
  return consumer_->answer(message, [](detail::Consumer& consumer, const detail::MessageId& id) { return consumer.channel.finish(consumer, id); });
}
inline bool Subscription::requeue(const Message& message, Duration delay) {
  return consumer_->answer(message, [delay](detail::Consumer& consumer, const detail::MessageId& id) {
    return consumer.channel.requeue(consumer, id, std::clamp<int64_t>(delay.count(), 0, consumer.channel.topic.broker.options.max_req_timeout.count()));
  });
}
inline bool Subscription::touch(const Message& message) {
  return consumer_->answer(message, [](detail::Consumer& consumer, const detail::MessageId& id) { return consumer.channel.touch(consumer, id, consumer.msg_timeout); });
}

inline Daemon::Daemon(Options options) : engine_(std::make_unique<detail::Engine>(std::move(options))) {}
inline Daemon::~Daemon() = default;
inline void Daemon::start() { engine_->start(); }
inline void Daemon::stop() { engine_->stop(); }
inline int Daemon::tcp_port() const { return engine_->tcp_port(); }
inline int Daemon::http_port() const { return engine_->http_port(); }

inline void Daemon::publish(std::string_view topic, std::string_view body) { engine_->publish(topic, &body, 1, Duration::zero()); }
inline void Daemon::publish(std::string_view topic, const std::vector<std::string>& bodies) {
  const std::vector<std::string_view> views(bodies.begin(), bodies.end());
  engine_->publish(topic, views.data(), views.size(), Duration::zero());
}
inline void Daemon::publish_deferred(std::string_view topic, std::string_view body, Duration delay) { engine_->publish(topic, &body, 1, delay); }

inline Subscription Daemon::subscribe(std::string_view topic, std::string_view channel, int max_in_flight) {
  return Subscription(engine_->subscribe(std::string(topic), std::string(channel), max_in_flight));
}

inline void Daemon::create_topic(std::string_view topic) {
  detail::Engine::check_name(topic);
  engine_->on_loop([this, topic] { engine_->broker().topic(topic); });
}
inline void Daemon::create_channel(std::string_view topic, std::string_view channel) {
  detail::Engine::check_name(topic);
  detail::Engine::check_name(channel);
  const std::string why = engine_->on_loop([this, topic, channel] {
    detail::Status status;
    static_cast<void>(engine_->broker().topic(topic).channel(channel, status));
    return status.error;
  });
  if (!why.empty()) throw std::runtime_error(why);
}
inline bool Daemon::delete_topic(std::string_view topic) {
  return engine_->with_topic(topic, [](detail::Topic& found) { found.broker.delete_topic(found); });
}
inline bool Daemon::empty_topic(std::string_view topic) {
  return engine_->with_topic(topic, [](detail::Topic& found) { found.empty(); });
}
inline bool Daemon::pause_topic(std::string_view topic, bool paused) {
  return engine_->with_topic(topic, [paused](detail::Topic& found) { found.pause(paused); });
}
inline bool Daemon::delete_channel(std::string_view topic, std::string_view channel) {
  return engine_->with_channel(topic, channel, [](detail::Channel& found) { found.topic.delete_channel(found); });
}
inline bool Daemon::empty_channel(std::string_view topic, std::string_view channel) {
  return engine_->with_channel(topic, channel, [](detail::Channel& found) { found.empty(); });
}
inline bool Daemon::pause_channel(std::string_view topic, std::string_view channel, bool paused) {
  return engine_->with_channel(topic, channel, [paused](detail::Channel& found) { found.pause(paused); });
}
inline Stats Daemon::stats() const {
  return engine_->on_loop([this] { return engine_->stats(); });
}

}  // namespace nsqd

// ---------------------------------------------------------------------------------------------------------------------
// [16] Options from flags and file
//
// One table names every flag, its key in the config file and in GET /config, its kind and its meaning. Flags are read as Go
// reads them, the file as the TOML that nsqd's own file uses; a flag wins over the file, the file over the default.
// ---------------------------------------------------------------------------------------------------------------------

namespace nsqd::detail {

using Texts = std::vector<std::string>;
using Numbers = std::vector<double>;

/// The member that a flag sets; none for the flags that are not settings.
using Target = std::variant<std::monostate, bool Options::*, int64_t Options::*, Duration Options::*, std::string Options::*,
                            Texts Options::*, Numbers Options::*, Level Options::*>;

struct Flag {
  std::string_view name;
  std::string_view key;  // "=": the name with underscores; empty: none
  Target target;
  std::string_view help;

  template <typename Value>
  bool sets() const { return std::holds_alternative<Value Options::*>(target); }
  bool is_bool() const { return sets<bool>() || name == "tls-required" || (key.empty() && name != "config"); }
  std::string key_text() const {
    std::string shown(key == "=" ? name : key);
    std::replace(shown.begin(), shown.end(), '-', '_');
    return shown;
  }
};

inline const std::vector<Flag>& flags() {
  using O = Options;
  static const std::vector<Flag> kFlags = {
      {"version", "", {}, "print the version and exit"},
      {"config", "", {}, "path of a config file (TOML)"},
      {"verbose", "", {}, "has no effect; use --log-level"},
      {"worker-id", "", {}, "has no effect; use --node-id"},
      {"tcp-address", "=", &O::tcp_address, "where TCP clients connect: <host>:<port>, or the path of a unix socket"},
      {"http-address", "=", &O::http_address, "where HTTP clients connect, likewise; empty: no HTTP"},
      {"https-address", "=", &O::https_address, "shown, and not used: there is no TLS here"},
      {"broadcast-address", "=", &O::broadcast_address, "the name that is told to nsqlookupd (default: the host's name)"},
      {"broadcast-tcp-port", "=", &O::broadcast_tcp_port, "the TCP port that is told to nsqlookupd (default: the one listened on)"},
      {"broadcast-http-port", "=", &O::broadcast_http_port, "the HTTP port that is told to nsqlookupd (default: the one listened on)"},
      {"data-path", "=", &O::data_path, "directory of everything that is kept (default: the current one)"},
      {"mem-only", "=", &O::mem_only, "keep nothing: no data path, no lock, no files"},
      {"mem-queue-size", "=", &O::mem_queue_size, "messages that a queue may hold which is in memory only (ephemerals, --mem-only)"},
      {"max-bytes-per-file", "=", &O::max_bytes_per_file, "largest segment file, in bytes"},
      {"sync-every", "=", &O::sync_every, "messages and finishes per fsync; 1: a publish is answered after its fsync"},
      {"sync-timeout", "=", &O::sync_timeout, "fsync at least this often when something changed; 0: never by time"},
      {"msg-timeout", "=", &O::msg_timeout, "time a consumer has for a message before it is requeued"},
      {"max-msg-timeout", "=", &O::max_msg_timeout, "longest such time that a client may ask for, and reach by TOUCH"},
      {"max-msg-size", "=", &O::max_msg_size, "largest message, in bytes"},
      {"max-body-size", "=", &O::max_body_size, "largest body of a command, in bytes"},
      {"max-req-timeout", "=", &O::max_req_timeout, "longest delay of REQ, DPUB and defer="},
      {"max-heartbeat-interval", "=", &O::max_heartbeat_interval, "longest interval between heartbeats that a client may ask for"},
      {"max-rdy-count", "=", &O::max_rdy_count, "largest RDY"},
      {"max-output-buffer-size", "=", &O::max_output_buffer_size, "largest output buffer that a client may ask for, in bytes"},
      {"max-output-buffer-timeout", "=", &O::max_output_buffer_timeout, "longest output buffer timeout that a client may ask for"},
      {"min-output-buffer-timeout", "=", &O::min_output_buffer_timeout, "shortest one"},
      {"output-buffer-timeout", "=", &O::output_buffer_timeout, "the one of clients that ask for none"},
      {"max-channel-consumers", "=", &O::max_channel_consumers, "consumers per channel; 0: no limit"},
      {"node-id", "id", &O::node_id, "0 to 1023, part of every message id (default: a hash of the host's name)"},
      {"lookupd-tcp-address", "nsqlookupd_tcp_addresses", &O::lookupd_tcp_address, "an nsqlookupd, <host>:<port> (may be repeated)"},
      {"auth-http-address", "auth_http_addresses", &O::auth_http_address, "an auth server, <host>:<port> or URL (may be repeated)"},
      {"auth-http-request-method", "=", &O::auth_http_request_method, "how it is asked: get or post"},
      {"http-client-connect-timeout", "=", &O::http_client_connect_timeout, "to connect to nsqlookupd's HTTP and auth servers"},
      {"http-client-request-timeout", "=", &O::http_client_request_timeout, "for the whole request"},
      {"topology-region", "=", &O::topology_region, "region of this daemon"},
      {"topology-zone", "=", &O::topology_zone, "zone of this daemon"},
      {"enable-experiment", "=", &O::enable_experiment, "topology-aware-consumption (may be repeated)"},
      {"log-level", "=", &O::log_level, "debug, info, warn, error or fatal"},
      {"log-prefix", "=", &O::log_prefix, "start of each log line"},
      {"statsd-address", "=", &O::statsd_address, "where statistics are pushed to, <host>:<port>; empty: nowhere"},
      {"statsd-prefix", "=", &O::statsd_prefix, "start of each metric's name; %s stands for the host and port"},
      {"statsd-interval", "=", &O::statsd_interval, "time between two pushes"},
      {"statsd-mem-stats", "=", &O::statsd_mem_stats, "push memory figures"},
      {"statsd-udp-packet-size", "=", &O::statsd_udp_packet_size, "largest packet, in bytes"},
      {"statsd-exclude-ephemeral", "=", &O::statsd_exclude_ephemeral, "leave out ephemeral topics and channels"},
      {"e2e-processing-latency-percentile", "e2e_processing_latency_percentiles", &O::e2e_processing_latency_percentile,
       "percentiles of the time from publish to finish, each above 0 up to 1, as a comma list (may be repeated)"},
      {"e2e-processing-latency-window-time", "=", &O::e2e_processing_latency_window_time, "the time that they are taken over"},
      {"deflate", "=", &O::deflate, "shown, and not used: clients are told that there is no compression"},
      {"snappy", "=", &O::snappy, "likewise"},
      {"max-deflate-level", "=", &O::max_deflate_level, "likewise, 1 to 9"},
      {"tls-cert", "=", &O::tls_cert, "refused: there is no TLS here"},
      {"tls-key", "=", &O::tls_key, "refused"},
      {"tls-root-ca-file", "=", &O::tls_root_ca_file, "refused"},
      {"tls-client-auth-policy", "=", &O::tls_client_auth_policy, "refused"},
      {"tls-required", "=", &O::tls_required, "refused, but for false"},
      {"tls-min-version", "=", &O::tls_min_version, "tls1.0, tls1.1, tls1.2 or tls1.3; shown, and not used"},
      {"queue-scan-worker-pool-max", "=", &O::queue_scan_worker_pool_max, "shown, and not used: deadlines need no scan here"},
      {"queue-scan-selection-count", "=", &O::queue_scan_selection_count, "likewise"},
  };
  return kFlags;
}

// ---- Words: each parse_word sets a value from a word of the user, or returns why it cannot ----------------------------------

inline constexpr const char* kParseError = "parse error";

inline std::string parse_word(std::string_view word, std::string& value) {
  value = word;
  return {};
}

inline std::string parse_word(std::string_view word, bool& value) {
  static constexpr std::array<std::string_view, 12> kWords = {"0", "f", "F", "false", "False", "FALSE",
                                                              "1", "t", "T", "true",  "True",  "TRUE"};
  const auto* found = std::find(kWords.begin(), kWords.end(), word);
  if (found == kWords.end()) return kParseError;
  value = found - kWords.begin() >= 6;
  return {};
}

/// An integer as Go's strconv reads it with base 0: sign, 0x 0o 0b or leading 0, underscores between digits.
inline std::string parse_word(std::string_view word, int64_t& value) {
  std::string digits = take_sign(word) ? "-" : "+";
  int64_t base = 10;
  if (word.size() > 1 && word[0] == '0') {
    const char kind = lower(word[1]);
    base = kind == 'x' ? 16 : kind == 'b' ? 2 : 8;
    word.remove_prefix(kind == 'x' || kind == 'b' || kind == 'o' ? 2 : 1);
  }
  if (word.empty() || word.back() == '_' || word.find("__") != word.npos || (base == 10 && word[0] == '_')) return kParseError;
  std::remove_copy(word.begin(), word.end(), std::back_inserter(digits), '_');
  if (!std::all_of(digits.begin() + 1, digits.end(), [base](char c) { return hex_digit(c) < base; })) return kParseError;
  const auto number = decimal(digits, true, base);
  value = number.value_or(0);
  return number ? "" : "value out of range";
}

/// A duration as Go reads it: a sign, then numbers with units; only 0 goes without.
inline std::string parse_word(std::string_view word, Duration& value) {
  static const std::map<std::string_view, int64_t> kUnits = {
      {"ns", 1}, {"us", kMicrosecond}, {"\xC2\xB5s", kMicrosecond}, {"\xCE\xBCs", kMicrosecond},
      {"ms", kMillisecond}, {"s", kSecond}, {"m", 60 * kSecond}, {"h", 3600 * kSecond}};
  const int64_t sign = take_sign(word) ? -1 : 1;
  if (word == "0") word = "0s";
  int64_t total = 0;
  do {
    const std::string_view whole = take_front(word, word.find_first_not_of(kDigits));
    const std::string_view fraction = take_front(word, word.substr(0, 1) == "." ? word.find_first_not_of(kDigits, 1) : 0);
    const auto unit = kUnits.find(take_front(word, word.find_first_of(".0123456789")));
    const auto count = decimal(text("0", whole));
    if ((whole.empty() && fraction.size() < 2) || unit == kUnits.end() || !count) return kParseError;
    double scale = static_cast<double>(unit->second) * 10;  // of the point itself
    int64_t part = 0, rest = 0;
    for (char c : fraction) rest += static_cast<int64_t>((c == '.' ? 0 : c - '0') * (scale /= 10));
    const bool overflow = __builtin_mul_overflow(*count, unit->second, &part) || __builtin_add_overflow(total, part, &total);
    if (overflow || __builtin_add_overflow(total, rest, &total)) return kParseError;
  } while (!word.empty());
  value = Duration(sign * total);
  return {};
}

inline std::optional<Level> parse_level(std::string_view word) {
  static constexpr std::array<std::string_view, 5> kWords = {"debug", "info", "warn", "error", "fatal"};
  const auto* found = std::find(kWords.begin(), kWords.end(), lower(word));
  return found == kWords.end() ? std::nullopt : std::optional(static_cast<Level>(found - kWords.begin() + 1));
}
inline std::string parse_word(std::string_view word, Level& value) {
  const auto level = parse_level(word);
  value = level.value_or(value);
  return level ? "" : text("invalid log level: ", word, " (debug, info, warn, error, fatal)");
}

inline Texts split_at_commas(std::string_view list) {
  Texts parts;
  for (bool more = true; more; list.remove_prefix(more ? 1 : 0)) {
    parts.emplace_back(take_front(list, list.find(',')));
    more = !list.empty();
  }
  return parts;
}
inline std::string parse_word(std::string_view word, Texts& values) {
  values.emplace_back(word);
  return {};
}
inline std::string parse_word(std::string_view word, Numbers& values) {
  for (const std::string& part : split_at_commas(word)) {
    char* end = nullptr;
    values.push_back(std::strtod(part.c_str(), &end));
    if (part.empty() || *end != '\0') throw std::runtime_error(text("Could not parse: ", part));
  }
  return {};
}

inline std::string read_tls_version(std::string_view word, int64_t& value) {
  static constexpr std::array<std::string_view, 5> kVersions = {"tls1.0", "tls1.1", "tls1.2", "tls1.3", ""};
  const auto* found = std::find(kVersions.begin(), kVersions.end(), lower(word));
  if (found == kVersions.end()) return "unknown TLS version";
  value = 769 + (found - kVersions.begin()) % 4;
  return {};
}
inline std::string read_tls_required(std::string_view word, int64_t& value) {
  bool required = false;
  const std::string why = word == "tcp-https" ? "" : parse_word(word, required);
  if (why.empty()) value = required ? 2 : word == "tcp-https" ? 1 : 0;
  return why;
}

inline std::string set_option(Options& options, const Flag& flag, std::string_view word) {
  if (flag.name == "tls-min-version") return read_tls_version(word, options.tls_min_version);
  if (flag.name == "tls-required") return read_tls_required(word, options.tls_required);
  bool unused = false;
  auto set = [&](auto member) -> std::string {
    if constexpr (!std::is_same_v<decltype(member), std::monostate>) return parse_word(word, options.*member);
    else return flag.is_bool() ? parse_word(word, unused) : "";
  };
  return std::visit(set, flag.target);
}

template <typename Value>
ShownOption shown(const Value& value) {
  if constexpr (std::is_same_v<Value, std::string>) return {value, false};
  else if constexpr (std::is_same_v<Value, Duration>) return shown(int64_t{value.count()});
  else if constexpr (std::is_same_v<Value, Level>) return shown(static_cast<int>(value));
  else return {JsonWriter().value(value).out};
}

inline const Flag* find_flag(const std::function<bool(const Flag&)>& wanted) {
  const auto found = std::find_if(flags().begin(), flags().end(), wanted);
  return found == flags().end() ? nullptr : &*found;
}
inline const Flag* setting(std::string_view key) {
  return find_flag([key](const Flag& flag) { return !flag.key.empty() && flag.key_text() == key; });
}

inline std::optional<ShownOption> show_option(const Options& options, std::string_view key) {
  const Flag* flag = setting(key);
  if (flag == nullptr) return std::nullopt;
  auto show = [&options](auto member) {
    if constexpr (std::is_same_v<decltype(member), std::monostate>) return ShownOption();
    else return shown(options.*member);
  };
  return std::visit(show, flag->target);
}

// ---- The command line --------------------------------------------------------------------------------------------------

inline std::string default_text(const Flag& flag) {
  const Options defaults;
  if (const auto* duration = std::get_if<Duration Options::*>(&flag.target)) return duration_text((defaults.**duration).count());
  if (flag.sets<Level>()) return "info";
  if (flag.name == "tls-min-version") return "tls1.0";
  return flag.key.empty() ? "" : show_option(defaults, flag.key_text())->value;
}

inline std::string usage() {
  std::string out = text("nsqd ", kVersion, " - an NSQ message queue daemon that speaks the protocols of nsqd ", kProtocolVersion,
                         "\n\nUsage: nsqd [--flag=value ...]\n\n"
                         "A flag may have one dash or two, and its value may follow as the next word, "
                         "but for those that are true or false.\n"
                         "Durations are numbers with units (1h30m, 250ms). A config file has the same settings, with _ for -.\n\nFlags:\n");
  for (const Flag& flag : flags()) {
    const std::string value = default_text(flag);
    const bool says_so = value.empty() || value == "[]" || flag.help.find("default:") != flag.help.npos;
    out += text("  --", flag.name, "\n        ", flag.help, says_so ? "" : text(" (default ", value, ")"), "\n");
  }
  return out;
}

/// The number of letters to change, add or take away between two words.
inline size_t distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i + 1);
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t best = std::min({row[j + 1] + 1, row[j] + 1, diagonal + (a[i] != b[j])});
      diagonal = std::exchange(row[j + 1], best);
    }
  }
  return row[b.size()];
}

[[noreturn]] inline void refuse_flag(const std::string& why, std::string_view hint = "nsqd --help lists all flags") {
  throw EarlyExit(2, text(why, "\n", hint));
}

[[noreturn]] inline void refuse_unknown_flag(const std::string& name) {
  auto nearer = [&](const Flag& a, const Flag& b) { return distance(a.name, name) < distance(b.name, name); };
  const auto nearest = std::min_element(flags().begin(), flags().end(), nearer);
  const std::string why = "flag provided but not defined: -" + name;
  if (distance(nearest->name, name) <= 1 + name.size() / 4) refuse_flag(why, text("did you mean --", nearest->name, "?"));
  refuse_flag(why);
}

/// What the flags say, read as Go's flag package does: up to the first word that is none.
struct CommandLine {
  Options options;
  std::set<const Flag*> given;
  std::string config;
  bool version = false;

  CommandLine(int argc, const char* const* argv) {
    for (int i = 1; i < argc; ++i) {
      const std::string word = argv[i];
      if (word.size() < 2 || word[0] != '-' || word == "--") break;
      const std::string body = word.substr(word[1] == '-' ? 2 : 1), name = body.substr(0, body.find('='));
      if (name.empty() || name[0] == '-') refuse_flag(text("bad flag syntax: ", word));
      if (name == "help" || name == "h") throw EarlyExit(0, usage(), true);
      const Flag* flag = find_flag([&name](const Flag& known) { return known.name == name; });
      if (flag == nullptr) refuse_unknown_flag(name);
      const bool next_word = name == body && !flag->is_bool();
      if (next_word && ++i >= argc) refuse_flag(text("flag needs an argument: -", name));
      set(*flag, next_word ? argv[i] : name == body ? "true" : body.substr(name.size() + 1));
    }
    std::sort(options.e2e_processing_latency_percentile.begin(), options.e2e_processing_latency_percentile.end(), std::greater<>());
  }

 private:
  void set(const Flag& flag, const std::string& word) {
    given.insert(&flag);
    const std::string why = set_option(options, flag, word);
    if (!why.empty() && flag.is_bool()) refuse_flag(text("invalid boolean value \"", word, "\" for -", flag.name, ": ", why));
    if (!why.empty()) refuse_flag(text("invalid value \"", word, "\" for flag -", flag.name, ": ", why));
    if (flag.name == "config") config = word;
    if (flag.name == "version") parse_word(word, version);
  }
};

// ---- The config file ---------------------------------------------------------------------------------------------------

/// Reads the TOML of a config file: JSON's values with comments, bare names and words, and strings in single quotes. Tables
/// are read over, and dates are taken for null.
class ConfigParser final : private JsonParser {
 public:
  /// What to do with a top-level setting; it returns what is wrong with it.
  using Take = std::function<std::string(const std::string& key, const Json& value)>;
  ConfigParser(std::string_view content, Take take_setting) : JsonParser(content), take_setting_(std::move(take_setting)) {}

  /// Returns what is wrong with the file, and where.
  std::string parse_file() {
    std::string table;
    for (skip(" \t\r\n"); at_ < input_.size(); skip(" \t\r\n")) {
      if (next() == '[') table = parse_header();
      else if (next() != '#') parse_setting(table);
      skip_space();
      skip("\r");
      if (at_ < input_.size() && next() != '\n') fail("expected the end of the line");
    }
    return error;
  }

 private:
  void parse_setting(const std::string& table) {
    const std::string key = parse_name();
    const Json value = parse_value();
    if (!error.empty()) error = key + ": " + error;
    if (!seen_.insert(table + key).second) fail(text("key ", key, " is given twice"));
    const std::string why = table.empty() && error.empty() ? take_setting_(key, value) : "";
    if (!why.empty()) fail(why);
  }
  /// [table] or [[table]]; the latter may come more than once.
  std::string parse_header() {
    const bool list = input_.substr(at_, 2) == "[[";
    at_ += list ? 2 : 1;
    const std::string name = parse_key();
    if (!take(']') || (list && !take(']'))) fail("expected ']'");
    return list ? text(name, "[", at_, "].") : name + ".";
  }
  std::string parse_key() {
    std::string key;
    do {
      skip_space();
      const bool in_quotes = next() == '"' || next() == '\'';
      const std::string part = in_quotes ? parse_string(true) : std::string(take_bare_key());
      if (!in_quotes && part.empty()) fail("expected a key");
      key += key.empty() ? part : "." + part;
    } while (take('.'));
    return key;
  }
  std::string_view take_bare_key() {
    const size_t begin = at_;
    skip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-");
    return input_.substr(begin, at_ - begin);
  }

  void skip_space() override {
    const std::string_view space = depth_ > 0 ? " \t\r\n" : " \t";
    for (skip(space); next() == '#'; skip(space)) at_ = std::min(input_.find('\n', at_), input_.size());
  }
  std::string parse_name() override {
    const std::string key = parse_key();
    if (!take('=')) fail("expected '=' after " + key);
    return key;
  }
  bool take_comma(char close) override { return JsonParser::take_comma(close) && !take(close); }
  bool parse_scalar(Json& value) override {
    if (next() == '"' || next() == '\'') {
      value.type = Json::Type::kString;
      value.string = parse_string(true);
      return true;
    }
    const std::string_view word = bare_word();
    const bool digit_first = kDigits.find(word.substr(0, 1)) < 10;
    value.string = number_text(word);
    value.boolean = word == "true";
    if (value.boolean || word == "false") value.type = Json::Type::kBool;
    else if (!value.string.empty()) value.type = Json::Type::kNumber;
    else if (word.empty() || !digit_first) return false;
    at_ += word.size();
    return true;
  }
  /// A number in decimal, an integer without a point; nothing for a word that is no number.
  static std::string number_text(std::string_view word) {
    const bool leading_zero = word.size() > 1 && word[0] == '0' && kDigits.find(word[1]) != kDigits.npos;
    if (leading_zero || word.substr(0, 1) == "_" || ends_with(word, "_")) return "";
    int64_t integer = 0;
    if (parse_word(word, integer).empty()) return std::to_string(integer);
    std::string plain(word);
    plain.erase(std::remove(plain.begin(), plain.end(), '_'), plain.end());
    char* end = nullptr;
    std::strtod(plain.c_str(), &end);
    return *end == '\0' && plain.find_first_of("xX") == plain.npos ? plain : "";
  }

  Take take_setting_;
  std::set<std::string> seen_;
};

/// The words that a flag would be given for a value of the file, by nsqd's rules: an integer is a duration in milliseconds,
/// and, as a truth value, the opposite of what one would think. Nothing for a value of the wrong type.
inline std::optional<Texts> words_for(const Flag& flag, const Json& value) {
  const bool is_text = value.is(Json::Type::kString), texts = flag.sets<Texts>(), numbers = flag.sets<Numbers>();
  const auto integer = value.integer();
  if (texts && is_text) return value.string.empty() ? Texts() : split_at_commas(value.string);
  if ((texts || numbers) && value.is(Json::Type::kArray)) {
    Texts words;
    for (const Json& item : value.items) {
      if (!item.is(texts ? Json::Type::kString : Json::Type::kNumber) || item.integer()) return std::nullopt;
      words.push_back(item.string);
    }
    return words;
  }
  if (flag.is_bool() && integer) return Texts{*integer == 0 ? "true" : "false"};
  if (flag.is_bool() && value.is(Json::Type::kBool)) return Texts{value.boolean ? "true" : "false"};
  if (flag.sets<Duration>() && integer) return Texts{text(*integer, "ms")};
  const bool is_integer = flag.sets<int64_t>() && !flag.is_bool() && flag.name != "tls-min-version";
  if (is_integer && integer) return Texts{value.string};
  return is_text && !(is_integer && !decimal(value.string, true)) ? std::optional(Texts{value.string}) : std::nullopt;
}

/// Sets what the file says, but for what the flags say: of that, only the type is looked at.
inline void apply_file(CommandLine& line) {
  Options unused;
  auto take = [&](const std::string& key, const Json& value) -> std::string {
    const Flag* flag = setting(key);
    if (flag == nullptr) return {};
    const auto words = words_for(*flag, value);
    if (!words) return text("the value of ", key, flag->sets<Numbers>() ? " needs numbers like 1.0" : " is of the wrong type");
    std::string why;
    for (const std::string& word : *words)
      if (why.empty()) why = set_option(line.given.count(flag) > 0 ? unused : line.options, *flag, word);
    return why.empty() ? "" : text(key, " = ", value.string, ": ", why);
  };
  try {
    const auto content = read_file(line.config);
    const std::string why = content ? ConfigParser(*content, take).parse_file() : "no such file";
    if (!why.empty()) throw std::runtime_error(why);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(text("failed to load config file ", line.config, " - ", error.what()));
  }
}

/// Fills in what depends on the host, and throws where a daemon cannot start with these options.
inline void complete_options(Options& options) {
  auto need = [](bool good, const std::string& otherwise) {
    if (!good) throw std::runtime_error("failed to instantiate nsqd - " + otherwise);
  };
  auto positive = [&need](Duration time, const std::string& flag) { need(time > Duration::zero(), flag + " must be above 0"); };
  auto not_negative = [&need](Duration time, const std::string& flag) { need(time >= Duration::zero(), flag + " must not be negative"); };
  const std::string host = host_name();
  if (options.node_id == Options::kFromHostName) options.node_id = checksum(0, host.data(), host.size()) % 1024;
  if (options.broadcast_address.empty()) options.broadcast_address = host;
  const std::string tls = text(options.tls_cert, options.tls_key, options.tls_root_ca_file, options.tls_client_auth_policy);
  need(tls.empty() && options.tls_required == 0,
       "there is no TLS in this daemon, so it does not start with --tls-cert, --tls-key, --tls-root-ca-file, "
       "--tls-client-auth-policy or --tls-required; leave them out, or put a proxy that ends TLS before it");
  need(options.max_deflate_level >= 1 && options.max_deflate_level <= 9, "--max-deflate-level must be [1,9]");
  need(options.node_id >= 0 && options.node_id < 1024, "--node-id must be [0,1024)");
  const bool known_method = options.auth_http_request_method == "get" || options.auth_http_request_method == "post";
  need(known_method, "--auth-http-request-method must be post or get");
  for (double percentile : options.e2e_processing_latency_percentile)
    need(percentile > 0 && percentile <= 1, text("invalid E2E processing latency percentile: ", percentile, " (must be in (0,1])"));
  need(options.mem_queue_size >= 0, "--mem-queue-size must not be negative");
  not_negative(options.sync_timeout, "--sync-timeout");
  not_negative(options.max_req_timeout, "--max-req-timeout");
  positive(options.output_buffer_timeout, "--output-buffer-timeout");
  positive(options.e2e_processing_latency_window_time, "--e2e-processing-latency-window-time");
  positive(std::min(options.msg_timeout, options.max_msg_timeout), "--msg-timeout and --max-msg-timeout");
  need(options.statsd_interval > std::chrono::seconds(1), "--statsd-interval must be above 1s");
  need(options.queue_scan_selection_count > 0, "--queue-scan-selection-count must be above 0");
  need(options.max_bytes_per_file > 0, "--max-bytes-per-file must be above 0");
  constexpr auto kMost = static_cast<int64_t>(kLargestSegment / 2);
  need(options.max_msg_size > 0 && options.max_msg_size <= kMost, text("--max-msg-size must be [1,", kMost, "]"));
  need(options.max_body_size > 0 && options.max_body_size <= std::numeric_limits<int32_t>::max(), "--max-body-size must be [1,2147483647]");
}

}  // namespace nsqd::detail

namespace nsqd {

inline Options options_from(int argc, const char* const* argv) {
  detail::CommandLine line(argc, argv);
  if (line.version) throw EarlyExit(0, detail::build_text(), true);
  if (!line.config.empty()) detail::apply_file(line);
  return line.options;
}

// ---------------------------------------------------------------------------------------------------------------------
// [17] Run
//
// How a program starts and stops: init, start, wait, stop. The only part that knows signals.
// Always: a signal that comes after run() has begun is seen exactly once, whatever the service is doing then.
// ---------------------------------------------------------------------------------------------------------------------

inline int run(Service& service, int argc, const char* const* argv, std::initializer_list<int> signals) {
  sigset_t awaited;
  ::sigemptyset(&awaited);
  for (int number : signals) ::sigaddset(&awaited, number);
  sigset_t blocked = awaited;
  ::sigaddset(&blocked, SIGXFSZ);  // a file that may not grow is an error of the write, and no end of the process
  ::pthread_sigmask(SIG_BLOCK, &blocked, nullptr);  // threads that the service starts inherit this
  rlimit descriptors{};
  if (::getrlimit(RLIMIT_NOFILE, &descriptors) == 0) {  // one for each client: as many as the system lets us have
    descriptors.rlim_cur = descriptors.rlim_max;
    ::setrlimit(RLIMIT_NOFILE, &descriptors);
  }
  const pthread_t waiting = ::pthread_self();
  const int end_signal = *signals.begin();
  try {
    service.init({argc, argv, [waiting, end_signal] { ::pthread_kill(waiting, end_signal); }});
    service.start();
  } catch (const EarlyExit& exit) {
    std::fprintf(exit.to_stdout ? stdout : stderr, "%s\n", exit.what());
    return exit.status;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", detail::Logger::line("[nsqd] ", Level::kFatal, error.what()).c_str());
    return 1;
  }
  int caught = 0;
  while (::sigwait(&awaited, &caught) != 0) {
  }
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
