// PyTorch's own OpenMP threads, found at run time: this library is not linked with any OpenMP.
//
// After an operation of PyTorch its threads wait for the next one at full speed, for milliseconds. Threads of our own would share the
// processors with them. So the rows go to the same threads.
#pragma once

namespace kdkernels {

using TeamRunner = void (*)(void (*member)(void*), void* data, unsigned threads, unsigned flags);

// GOMP_parallel of the OpenMP library that PyTorch has loaded, or nullptr: there is none, or this process is a forked child, in which
// that library's threads are gone and a call would wait for ever. Data loaders fork.
TeamRunner openmp_team();

}  // namespace kdkernels
