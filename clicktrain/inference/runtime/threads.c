// Threads that run one call together: started with a context, asleep between calls, meeting after each operation.
#define _POSIX_C_SOURCE 200809L
#include <stdatomic.h>
#include <stdlib.h>

#include "runtime.h"

#ifdef MODEL_NO_THREADS  // for systems without POSIX threads
model_team *model_team_new(int count) { (void)count; return NULL; }
void model_team_free(model_team *team) { (void)team; }
void model_team_run(model_team *team, model_work work, void *given) { (void)team, (void)work, (void)given; }
void model_meet(model_team *team) { (void)team; }
#else
#include <pthread.h>
#include <sched.h>
#include <signal.h>

#define SPINS 20000      // looks at a flag before a thread sleeps: some tens of microseconds
#define SPINS_BUSY 2000  // before it lets others run

typedef struct { model_team *team; pthread_t thread; int number; } member;

struct model_team {
  int count, started, ending;
  model_work work;
  void *given;
  atomic_uint calls;  // that were begun
  char apart_calls[60];
  atomic_uint arrived, round;
  char apart_round[56];
  pthread_mutex_t lock;
  pthread_cond_t wake;
  member members[];   // but the caller
};

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

void model_meet(model_team *team) {
  const unsigned round = atomic_load_explicit(&team->round, memory_order_acquire);
  if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) + 1 == (unsigned)team->count) {
    atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&team->round, round + 1, memory_order_release);
    return;
  }
  for (int n = 0; atomic_load_explicit(&team->round, memory_order_acquire) == round; ++n) {
    if (n < SPINS_BUSY) pause_briefly();
    else sched_yield();
  }
}

static void *serve(void *argument) {
  const member *self = argument;
  model_team *team = self->team;
  for (unsigned seen = 0;;) {
    for (int n = 0; n < SPINS && atomic_load_explicit(&team->calls, memory_order_acquire) == seen; ++n)
      pause_briefly();
    if (atomic_load_explicit(&team->calls, memory_order_acquire) == seen) {
      pthread_mutex_lock(&team->lock);
      while (atomic_load_explicit(&team->calls, memory_order_acquire) == seen)
        pthread_cond_wait(&team->wake, &team->lock);
      pthread_mutex_unlock(&team->lock);
    }
    ++seen;
    if (team->ending) return NULL;
    team->work(team->given, (model_worker){team, self->number, team->count});
    model_meet(team);
  }
}

static void begin(model_team *team) {
  pthread_mutex_lock(&team->lock);
  atomic_fetch_add_explicit(&team->calls, 1, memory_order_release);
  pthread_cond_broadcast(&team->wake);
  pthread_mutex_unlock(&team->lock);
}

void model_team_run(model_team *team, model_work work, void *given) {
  team->work = work;
  team->given = given;
  begin(team);
  work(given, (model_worker){team, 0, team->count});
  model_meet(team);
}

void model_team_free(model_team *team) {
  if (!team) return;
  team->ending = 1;
  begin(team);
  for (int n = 0; n < team->started; ++n) pthread_join(team->members[n].thread, NULL);
  pthread_cond_destroy(&team->wake);
  pthread_mutex_destroy(&team->lock);
  free(team);
}

model_team *model_team_new(int count) {
  model_team *team = calloc(1, sizeof *team + (size_t)(count - 1) * sizeof(member));
  if (!team) return NULL;
  team->count = count;
  pthread_mutex_init(&team->lock, NULL);
  pthread_cond_init(&team->wake, NULL);
  // Signals are for the threads of the program.
  sigset_t all, before;
  sigfillset(&all);
  const int masked = pthread_sigmask(SIG_SETMASK, &all, &before) == 0;
  for (int n = 0; n + 1 < count; ++n) {
    member *one = team->members + n;
    one->team = team;
    one->number = n + 1;
    if (pthread_create(&one->thread, NULL, serve, one) != 0) break;
    ++team->started;
  }
  if (masked) pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (team->started + 1 == count) return team;
  model_team_free(team);
  return NULL;
}
#endif
