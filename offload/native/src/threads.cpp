#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define PAUSE() std::this_thread::yield()
#endif

#if !defined(_WIN32)
#include <pthread.h>
#include <signal.h>
#include <unistd.h>
#endif

#if defined(__linux__)
#include <sys/resource.h>
#endif

namespace {

#if defined(_WIN32)
using Process = int;
Process this_process() { return 0; }
#else
using Process = pid_t;
Process this_process() { return getpid(); }
#endif

using Time = std::chrono::microseconds;

// How long a thread looks whether a phase has ended before it sleeps: about as long as a chunk takes; waking
// up would take longer.
constexpr Time PHASE_END{10};

// How long a helper looks for another job before it sleeps: longer than it takes a call of several layers to
// come to its next job.
constexpr Time NEXT_JOB{50};

// How many jobs a helper sleeps until, after the system gave its processor to others in the middle of one.
constexpr int JOBS_TO_SLEEP = 100;

// Looks until `there()` or until the time is over; returns whether it is there.
template <class There>
bool look(Time time, const There& there) {
  const auto end = std::chrono::steady_clock::now() + time;
  do {
    for (int i = 0; i < 16; ++i) {
      if (there()) return true;
      PAUSE();
    }
  } while (std::chrono::steady_clock::now() < end);
  return there();
}

// Whether a helper should look for its next job. Where other programs want the processors as well, a thread
// that never sleeps is interrupted in its jobs, for which the others wait: then it had better sleep between
// jobs, since a thread that wakes up goes first.
class Patience {
 public:
  // To be asked at the end of each job.
  bool left() {
    const long now = interruptions();
    if (now != before_) sleeps_ = JOBS_TO_SLEEP;
    before_ = now;
    return sleeps_ == 0 || --sleeps_ == 0;
  }

 private:
  // How often the system has interrupted this thread in favour of others, where it says so.
  static long interruptions() {
#if defined(__linux__)
    rusage usage;
    if (getrusage(RUSAGE_THREAD, &usage) == 0) return usage.ru_nivcsw;
#endif
    return 0;
  }

  long before_ = interruptions();
  int sleeps_ = 0;
};

struct Phase {
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int64_t> done{0};
  int64_t chunks = 0;
};

// Consecutive chunks, which one thread does in order.
struct Run {
  int64_t first, count;
};

struct Job {
  Work work = nullptr;
  void* context = nullptr;
  int phases = 0;
  int helpers = 0;             // how many helpers may join
  std::atomic<int> joined{0};  // how many have tried to join
  std::atomic<int> asleep{0};  // threads that sleep until a phase ends
  Phase phase[MAX_PHASES];
};

class Pool {
 public:
  explicit Pool(Process process) : process(process) {}

  const Process process;  // whose threads these are

  void run(int threads, int phases, const int64_t* chunks, Work work, void* context) {
    std::unique_lock<std::mutex> busy(one_job_, std::try_to_lock);
    if (!busy.owns_lock() || threads == 1) {
      run_alone(phases, chunks, work, context);
      return;
    }
    Job job;
    job.work = work;
    job.context = context;
    job.phases = phases;
    for (int p = 0; p < phases; ++p) job.phase[p].chunks = chunks[p];
    publish(job, threads - 1);
    take_part(job, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    left_.wait(lock, [this] { return inside_ == 0; });
  }

  static void run_alone(int phases, const int64_t* chunks, Work work, void* context) {
    for (int p = 0; p < phases; ++p)
      for (int64_t c = 0; c < chunks[p]; ++c) work(context, p, c, 0);
  }

 private:
  void publish(Job& job, int helpers) {
    std::lock_guard<std::mutex> lock(mutex_);
    try {
      for (; helpers_ < helpers; ++helpers_) std::thread(&Pool::help, this).detach();
    } catch (const std::system_error&) {
      // The system refuses more threads; work with those that exist.
    }
    job.helpers = std::min(helpers, helpers_);
    job_ = &job;
    ++generation_;
    wake_.notify_all();
  }

  void help() {
    block_signals();
    Patience patience;
    bool took_part = false;
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (took_part) {
        lock.unlock();
        if (patience.left()) look(NEXT_JOB, [&] { return generation_.load() != seen; });
        lock.lock();
      }
      wake_.wait(lock, [&] { return job_ != nullptr && generation_.load() != seen; });
      seen = generation_.load();
      Job& job = *job_;
      const int number = job.joined.fetch_add(1) + 1;
      took_part = number <= job.helpers;
      if (!took_part) continue;
      ++inside_;
      lock.unlock();
      take_part(job, number);
      lock.lock();
      if (--inside_ == 0) left_.notify_one();
    }
  }

  void take_part(Job& job, int thread) {
    for (int p = 0; p < job.phases; ++p) {
      Phase& phase = job.phase[p];
      for (Run run = claim(job, phase); run.count > 0; run = claim(job, phase)) {
        for (int64_t c = 0; c < run.count; ++c) job.work(job.context, p, run.first + c, thread);
        if (phase.done.fetch_add(run.count) + run.count == phase.chunks && job.asleep.load() > 0) {
          std::lock_guard<std::mutex> lock(mutex_);
          phase_done_.notify_all();
        }
      }
      const bool last = p + 1 == job.phases;
      if (!last || thread == 0) wait_for(job, phase);
    }
  }

  // Claims long runs of chunks first, since the end of each chunk prefetches the start of the next; and short
  // runs at the end, so that all threads finish together.
  static Run claim(const Job& job, Phase& phase) {
    int64_t first = phase.next.load(std::memory_order_relaxed), count;
    do {
      if (first >= phase.chunks) return {first, 0};
      count = std::max<int64_t>(1, (phase.chunks - first) / (4 * (job.helpers + 1)));
    } while (!phase.next.compare_exchange_weak(first, first + count, std::memory_order_relaxed));
    return {first, count};
  }

  void wait_for(Job& job, Phase& phase) {
    if (look(PHASE_END, [&] { return phase.done.load() == phase.chunks; })) return;
    job.asleep.fetch_add(1);
    {
      std::unique_lock<std::mutex> lock(mutex_);
      phase_done_.wait(lock, [&] { return phase.done.load() == phase.chunks; });
    }
    job.asleep.fetch_sub(1);
  }

  static void block_signals() {
#if !defined(_WIN32)
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);
#endif
  }

  std::mutex one_job_;
  std::mutex mutex_;  // guards everything below
  std::condition_variable wake_, phase_done_, left_;
  Job* job_ = nullptr;
  std::atomic<uint64_t> generation_{0};
  int helpers_ = 0;
  int inside_ = 0;
};

// One pool per process, which is never destroyed: its threads sleep in it until the process ends. A forked
// child has none of these threads, and its copy of the pool may be in any state, so it makes a pool of its
// own. No lock is involved, which a fork could leave locked in the child.
Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  Pool* found = current.load();
  while (found == nullptr || found->process != this_process()) {
    Pool* made = new Pool(this_process());
    if (current.compare_exchange_strong(found, made)) return *made;
    delete made;  // another thread came first, and `found` is its pool now
  }
  return *found;
}

}  // namespace

void run_phases(int threads, int phases, const int64_t* chunks, Work work, void* context) {
  threads = std::max(1, std::min(threads, MAX_THREADS));
  if (threads == 1)
    Pool::run_alone(phases, chunks, work, context);
  else
    pool().run(threads, phases, chunks, work, context);
}
