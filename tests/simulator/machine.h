// A GPU of threads that take turns: what the kernel's text needs of a machine, for ptx.h.
//
// Each lane is a fiber. A scheduler picks warps at random (by a seed) and runs their lanes until they
// wait; now and then a warp sleeps. Copies take a random time, and until they have come the memory that
// they go to is NaN. So what only works in one order fails with one seed or another.
#pragma once
#include <cstdint>
#include <functional>

namespace machine {

constexpr uint32_t WARP = 32;

// The lane that runs.
uint32_t thread();
uint32_t block();
uint32_t blocks();
// Shared memory of its block.
uint8_t* shared();
// Turns of the scheduler so far.
uint64_t time();

// Lets others run.
void yield();
// Whether one of so many things happens that are equally likely.
bool luck(uint32_t of);
// Lets others run until a condition holds.
void wait(std::function<bool()> condition);
// Waits for all lanes of the warp; their values, by lane.
const uint64_t* exchange(uint64_t value);
// Waits for `threads` threads of the block.
void meet(uint32_t number, uint32_t threads);
// Ends the simulation as failed.
[[noreturn]] void fail(const char* what);
// The same of a kernel that gave up waiting, with the record that it has left.
[[noreturn]] void give_up();

void barrier_init(uint64_t* barrier, uint32_t arrivals);
void barrier_arrive(uint64_t* barrier);
void barrier_expect(uint64_t* barrier, uint32_t bytes);
// Whether the phase of this parity is over; waits a while for it.
bool barrier_try(uint64_t* barrier, uint32_t parity);
// The same without waiting.
bool barrier_test(uint64_t* barrier, uint32_t parity);
// Copies later, and counts the bytes on the barrier.
void copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier);
// Copies four bytes when the lane waits for their group; until then they are NaN.
void copy_word(void* to, const void* from);
void copy_group();
// Waits for all groups of the lane but the last `left`.
void copy_wait(uint32_t left);

}  // namespace machine
