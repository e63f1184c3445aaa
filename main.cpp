// nsqd, the program: the daemon of nsqd.hpp as a service that runs until SIGINT or SIGTERM.

#include "nsqd.hpp"

namespace {

class Program : public nsqd::Service {
 public:
  void init(const nsqd::Environment& environment) override {
    daemon_ = std::make_unique<nsqd::Daemon>(nsqd::options_from(environment.argc, environment.argv));
  }
  void start() override { daemon_->start(); }
  int stop() override {
    daemon_->stop();
    return 0;
  }

 private:
  std::unique_ptr<nsqd::Daemon> daemon_;
};

}  // namespace

int main(int argc, char** argv) {
  Program program;
  return nsqd::run(program, argc, argv);
}
