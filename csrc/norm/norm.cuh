// SPDX-License-Identifier: Apache-2.0
// What the kernels of the norms are made of: eight channels at a time, rows that arrive in shared
// memory while earlier ones are worked on, sums over a block, and the choice of a kernel.
//
// A block takes one row at a time and each thread the same channels of every row, so that vectors
// over channels and sums over rows stay in registers, and no thread reads what another has copied.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/channels.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "norm/kernels_cuda.h"

namespace fastvideo::cuda::norm {

inline constexpr int kMaxStages = 4;

// Channels of a vector, `otherwise` where there is none.
template <class T>
__device__ __forceinline__ Float8 load_vector(const Vectors& vectors, int64_t offset,
                                              float otherwise) {
    if (!vectors.data) return filled(otherwise);
    if (sizeof(T) == sizeof(float) || vectors.is_float)
        return load_eight(static_cast<const float*>(vectors.data) + offset);
    return load_eight(static_cast<const T*>(vectors.data) + offset);
}

// ---- what a block works on --------------------------------------------------------------------

// The block's part of a group.
struct Chunk {
    int index;  // of all chunks
    int sample, group;
    int first;  // row of the sample
    int rows;

    __device__ __forceinline__ explicit Chunk(const Grid& grid)
        : index(static_cast<int>(blockIdx.x)) {
        const int part = index % grid.chunks, of_all = index / grid.chunks;
        sample = of_all / grid.groups;
        group = of_all % grid.groups;
        const int skipped = part * grid.chunk_rows;
        first = group * grid.group_rows + skipped;
        rows = max(0, min(grid.chunk_rows, grid.group_rows - skipped));
    }
};

// The channels of this thread: kVectors times eight, a block's width apart.
struct Columns {
    int width;

    __device__ __forceinline__ int first(int i) const {
        return (i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kEight;
    }
    __device__ __forceinline__ bool has(int i) const { return first(i) < width; }
};

// The row's place relative to the first of its sample.
__device__ __forceinline__ int64_t row_offset(const Rows& rows, int row, int heads) {
    if (heads == 1) return row * rows.token;
    return row / heads * rows.token + row % heads * rows.head;
}

template <class T>
__device__ __forceinline__ T* sample_of(const Rows& rows, int sample) {
    return static_cast<T*>(rows.data) + sample * rows.batch;
}

// Up to here a thread can keep what it needs for all of its channels.
inline constexpr int kFewVectors = 2;
// Loops over more columns stay loops: unrolled, they would load ahead into registers there are not.
template <int kVectors>
inline constexpr int kUnroll = kVectors <= kFewVectors ? kVectors : 1;

// A vector for each of the thread's columns: in registers, or read again where those are many.
template <int kVectors, class Load>
class Kept {
  public:
    __device__ __forceinline__ Kept(const Columns& columns, Load load) : load_(load) {
        if constexpr (kInRegisters) {
#pragma unroll
            for (int i = 0; i < kVectors; ++i)
                if (columns.has(i)) kept_[i] = load_(i);
        }
    }
    // For columns that the thread has.
    __device__ __forceinline__ auto operator[](int i) const {
        if constexpr (kInRegisters)
            return kept_[i];
        else
            return load_(i);
    }

  private:
    static constexpr bool kInRegisters = kVectors <= kFewVectors;
    Load load_;
    decltype(load_(0)) kept_[kInRegisters ? kVectors : 1] = {};
};

template <int kVectors, class Load>
__device__ __forceinline__ Kept<kVectors, Load> keep(const Columns& columns, Load load) {
    return Kept<kVectors, Load>(columns, load);
}

// ---- rows on their way in ---------------------------------------------------------------------

// Reads kInputs tensors row by row. While a thread has few vectors, `stages` rows are under way to
// shared memory, where each thread finds what it copied itself. With more of them there is enough
// to wait for in a single row, and it is read where it is.
template <class T, int kVectors, int kInputs>
class Inputs {
  public:
    template <class... EachRows>
    __device__ __forceinline__ Inputs(const Grid& grid, const Chunk& chunk, unsigned char* shared,
                                      const EachRows&... inputs)
        : rows_{inputs...},
          samples_{sample_of<const T>(inputs, chunk.sample)...},
          columns_{grid.width},
          chunk_(chunk),
          heads_(grid.heads),
          stages_(grid.stages) {
        if constexpr (kStaged) {
            slots_ = reinterpret_cast<T*>(shared) + threadIdx.x * kEight;
            for (int row = 0; row < stages_ - 1; ++row) start(row);
        }
    }

    // Rows are asked for in order; each may be read until the next is asked for.
    __device__ __forceinline__ void advance(int row) {
        row_ = row;
        if constexpr (kStaged) {
            start(row + stages_ - 1);
            wait();
            reading_ = row == 0 || reading_ + 1 == stages_ ? 0 : reading_ + 1;
        }
    }

    // Of the current row, columns that the thread has.
    __device__ __forceinline__ Float8 get(int input, int i) const {
        if constexpr (kStaged)
            return load_eight(slots_ + slot(reading_, input, i));
        else
            return load_eight(place(input, row_) + columns_.first(i));
    }

  private:
    static constexpr bool kStaged = kVectors <= kFewVectors;

    __device__ __forceinline__ const T* place(int input, int row) const {
        return samples_[input] + row_offset(rows_[input], chunk_.first + row, heads_);
    }

    __device__ __forceinline__ int slot(int stage, int input, int i) const {
        const int vector = (stage * kInputs + input) * kVectors + i;
        return vector * static_cast<int>(blockDim.x) * kEight;
    }

    // Its place held the row before the current one, which this thread is done with.
    __device__ __forceinline__ void start(int row) {
        if (row < chunk_.rows) {
#pragma unroll
            for (int k = 0; k < kInputs; ++k) {
                const T* from = place(k, row);
#pragma unroll
                for (int i = 0; i < kVectors; ++i) {
                    if (!columns_.has(i)) continue;
                    const uint32_t to = shared_address(slots_ + slot(filling_, k, i));
#pragma unroll
                    for (int byte = 0; byte < kEight * static_cast<int>(sizeof(T)); byte += 16)
                        copy_async_16(to + byte, reinterpret_cast<const unsigned char*>(
                                                     from + columns_.first(i)) +
                                                     byte);
                }
            }
        }
        copy_async_commit();
        filling_ = filling_ + 1 == stages_ ? 0 : filling_ + 1;
    }

    __device__ __forceinline__ void wait() const {
        static_assert(kMaxStages == 4);
        switch (stages_) {
            case 1:
                return copy_async_wait<0>();
            case 2:
                return copy_async_wait<1>();
            case 3:
                return copy_async_wait<2>();
            default:
                return copy_async_wait<3>();
        }
    }

    Rows rows_[kInputs];
    const T* samples_[kInputs];
    Columns columns_;
    const Chunk& chunk_;
    int heads_, stages_;
    T* slots_ = nullptr;
    int row_ = 0, reading_ = 0, filling_ = 0;
};

// ---- sums over a block -------------------------------------------------------------------------

// Adds up to two numbers of all threads. Two places in shared memory take turns, so that one
// barrier is enough: a thread writes to a place again only after all have left it.
class BlockSum {
  public:
    static constexpr int kMaxWarps = 16, kMaxSums = 2;
    static constexpr size_t kSharedBytes = 2 * kMaxSums * kMaxWarps * sizeof(float);

    __device__ __forceinline__ explicit BlockSum(unsigned char* shared)
        : place_(reinterpret_cast<float*>(shared)) {
        for (unsigned i = threadIdx.x; i < 2 * kMaxSums * kMaxWarps; i += blockDim.x)
            place_[i] = 0.0f;
        __syncthreads();
    }

    template <int kSums>
    __device__ __forceinline__ void operator()(float (&sums)[kSums]) {
#pragma unroll
        for (int flip = 16; flip > 0; flip /= 2)
#pragma unroll
            for (int n = 0; n < kSums; ++n) sums[n] += __shfl_xor_sync(kAllLanes, sums[n], flip);
        if (blockDim.x == 32) return;
        float* const place = place_ + turn_ * kMaxSums * kMaxWarps;
        turn_ ^= 1;
        if (threadIdx.x % 32 == 0)
#pragma unroll
            for (int n = 0; n < kSums; ++n) place[n * kMaxWarps + threadIdx.x / 32] = sums[n];
        __syncthreads();
#pragma unroll
        for (int n = 0; n < kSums; ++n) {
            sums[n] = 0.0f;
            for (unsigned warp = 0; warp < blockDim.x / 32; warp += 4) {
                const float4 four = load<float4>(place + n * kMaxWarps + warp);
                sums[n] += (four.x + four.y) + (four.z + four.w);
            }
        }
    }

  private:
    float* place_;
    int turn_ = 0;
};

// ---- choosing and launching a kernel ----------------------------------------------------------

// Threads of a block, for wider rows with more channels each.
template <int kVectors>
inline constexpr int kMaxThreads = kVectors == 1   ? 256
                                   : kVectors == 2 ? 384
                                                   : 512;
static_assert(kMaxWidth == kMaxThreads<4> * 4 * kEight);

template <class Type, int vectors>
struct Variant {
    using T = Type;
    static constexpr int kVectors = vectors;
};

// Calls `function` with the variant for these rows.
template <class Function>
void with_variant(const Grid& grid, const Function& function) {
    auto with_type = [&]<class T>(T) {
        if (grid.width > kMaxThreads<2> * 2 * kEight)
            function(Variant<T, 4>{});
        else if (grid.width > kMaxThreads<1> * kEight)
            function(Variant<T, 2>{});
        else
            function(Variant<T, 1>{});
    };
    if (grid.dtype == Dtype::kFloat)
        with_type(float{});
    else if (grid.dtype == Dtype::kBFloat16)
        with_type(BFloat16{});
    else
        with_type(Float16{});
}

inline int threads_for(int width, int vectors) {
    const int lanes = (width + vectors * kEight - 1) / (vectors * kEight);
    return (lanes + 31) / 32 * 32;
}

// Cuts groups into chunks so that the block with the most to do has as little as possible, where
// a block costs as much as `start_rows` rows before it begins.
inline void cut(Grid& grid, int64_t places, int start_rows) {
    const int64_t groups = std::max<int64_t>(1, grid.num_groups());
    int64_t least = INT64_MAX;
    for (int64_t waves = 1; waves <= 4; ++waves) {
        const int64_t wanted = std::min<int64_t>(waves * places / groups, grid.group_rows);
        const int64_t chunks = std::max<int64_t>(1, wanted);
        const int64_t rows = (grid.group_rows + chunks - 1) / chunks;
        const int64_t cost = (groups * chunks + places - 1) / places * (rows + start_rows);
        if (cost >= least) continue;
        least = cost;
        grid.chunks = static_cast<int>(chunks);
        grid.chunk_rows = static_cast<int>(rows);
    }
}

struct Shape {
    int threads;
    size_t shared_bytes;
};

// Sets stages and chunks. Shared memory stays within what every device has, so that two blocks fit
// on the larger ones.
template <class V, class Kernel>
Shape plan(Grid& grid, V, int inputs, Kernel* kernel, int start_rows) {
    constexpr size_t kBudget = 96 * 1024;
    Shape shape{threads_for(grid.width, V::kVectors), BlockSum::kSharedBytes};
    if constexpr (V::kVectors <= kFewVectors) {
        const size_t stage = static_cast<size_t>(shape.threads) * V::kVectors * kEight * inputs *
                             sizeof(typename V::T);
        grid.stages = static_cast<int>(std::clamp<size_t>(kBudget / stage, 1, kMaxStages));
        shape.shared_bytes += grid.stages * stage;
    }
    const int resident = blocks_per_multiprocessor(kernel, shape.threads, shape.shared_bytes);
    cut(grid, static_cast<int64_t>(resident) * num_multiprocessors(), start_rows);
    return shape;
}

template <class Arguments>
void launch_chunks(void (*kernel)(Arguments), const Arguments& arguments, Shape shape,
                   Stream stream) {
    STD_TORCH_CHECK(arguments.num_chunks() <= INT32_MAX, "norm: ", arguments.num_chunks(),
                    " blocks, expected at most ", INT32_MAX);
    if (arguments.num_chunks() == 0) return;
    launch(kernel, dim3(static_cast<unsigned>(arguments.num_chunks())),
           dim3(static_cast<unsigned>(shape.threads)), shape.shared_bytes, stream, arguments);
}

}  // namespace fastvideo::cuda::norm
