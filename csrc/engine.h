// The model on a CPU: mirrors model/model.py block by block. Weights are packed matrices in memory that the caller owns.
#pragma once
#include <algorithm>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace zamba2 {

struct Config {  // names and meanings of config.py
  int hidden_size, num_hidden_layers, vocab_size, num_mem_blocks, mamba_d_state, n_mamba_heads, mamba_headdim, mamba_ngroups, mamba_d_conv;
  int d_inner, conv_dim, in_proj_dim, num_attention_heads, num_key_value_heads, attention_head_dim, intermediate_size, adapter_rank;
  float rms_norm_eps, attention_scale;
  double rope_base;
  bool use_mem_rope, use_shared_attention_adapter, tie_word_embeddings;
  std::vector<int> hybrid_layer_ids;
  int q_rows() const { return num_attention_heads * attention_head_dim; }
  int kv_rows() const { return num_key_value_heads * attention_head_dim; }
};

// Where the keys and values of all heads lie in a page of one hybrid position: parts one behind the other, each (heads, kPage)
// rows. q8 has two more parts, the scales. The same parts, (heads, length) rows each, make up a saved state.
struct PageLayout {
  struct Part {
    size_t offset, row;  // bytes
  };
  KVFormat format;
  int heads;
  std::vector<Part> parts;  // keys, values[, key scales, value scales]
  size_t bytes;
  PageLayout(KVFormat format, int heads, int d);
  KeysValues head(int h, const uint8_t* const* pages) const;
};

// Blocks of one size that nobody holds, for those who need one next: a server's states come and go by the thousand, memory that was never
// touched is slow, and among all else that is allocated they leave gaps.
class Blocks {
 public:
  explicit Blocks(size_t bytes) : bytes(bytes), most_(std::clamp<size_t>(kKept / bytes, 1, 4096)) { free_.reserve(most_); }
  ~Blocks() {
    for (void* block : free_) ::operator delete(block, std::align_val_t{64});
  }
  Blocks(const Blocks&) = delete;
  Blocks& operator=(const Blocks&) = delete;
  void* take() {
    {
      const std::lock_guard<std::mutex> alone(mutex_);
      if (!free_.empty()) {
        void* block = free_.back();
        free_.pop_back();
        return block;
      }
    }
    return ::operator new(bytes, std::align_val_t{64});  // not initialized, so that the system backs only what is used
  }
  void give(void* block) noexcept {
    {
      const std::lock_guard<std::mutex> alone(mutex_);
      if (free_.size() < most_) return free_.push_back(block);
    }
    ::operator delete(block, std::align_val_t{64});
  }
  const size_t bytes;

 private:
  static constexpr size_t kKept = size_t{256} << 20;  // bytes that are kept at most
  const size_t most_;
  std::mutex mutex_;
  std::vector<void*> free_;
};

// A block while it is held.
struct Held {
  explicit Held(std::shared_ptr<Blocks> from) : blocks(std::move(from)), block(blocks->take()) {}
  ~Held() { blocks->give(block); }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  const std::shared_ptr<Blocks> blocks;
  void* const block;
};

// Floats in a block.
struct Values : Held {
  using Held::Held;
  size_t size() const { return blocks->bytes / sizeof(float); }
  float* data() const { return static_cast<float*>(block); }
  float* begin() const { return data(); }
  float* end() const { return data() + size(); }
};

// kPage tokens, written front to back. Several states may share a page, and its first `used` tokens never change.
struct Page : Held {
  using Held::Held;
  uint8_t* const data = static_cast<uint8_t*>(block);
  int used = 0;
};

struct Cache {
  std::vector<std::shared_ptr<Page>> pages;  // as many as hold `length` tokens
  int length = 0;
};

// A run-time adapter (LoRA): y += scale * up(down(x)) behind some of the model's products.
struct Lora {
  struct Part {
    Matrix down, up;
    int column;  // of y, where its rows begin
    float scale;
  };
  std::unordered_map<const Matrix*, std::vector<Part>> parts;
};

// Of each layer what a short call's tokens brought to its convolution and scan, which have not gone on yet.
struct Record {
  int length;
  std::vector<float> inputs;  // (layers, length, conv_dim), before the convolution
  std::vector<float> dt;      // (layers, length, heads), behind softplus
};

struct State {
  int position = 0;
  std::shared_ptr<const Lora> lora;  // of the engine that made the state, or none
  std::shared_ptr<Values> conv;  // (layers, taps - 1, conv_dim)
  std::shared_ptr<Values> ssm;   // (layers, heads, P, N)
  std::vector<Cache> caches;
  std::shared_ptr<Record> record;  // of the last call, whose tokens position and caches count already; or none
  bool broken = false;  // a call on it failed midway; it was being updated in place
  size_t bytes() const;
};

struct Call {
  State* state;
  const int32_t* tokens;
  int length;
  int logits;  // trailing positions wanted
  bool record = false;
};

inline constexpr int kWidest = 1 << 21;      // of any row of weights or activations, 60 times what the 7B model needs: with
inline constexpr int kMostTokens = 1 << 30;  // this many tokens of a state, no int below overflows

// Not enough memory for a call; says how much was needed and for what.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string what) : what_(std::move(what)) {}
  const char* what() const noexcept override { return what_.c_str(); }

 private:
  std::string what_;
};

using Observer = std::function<void(const std::string&, const float*, int, int)>;  // name, data (rows, cols)

class Engine {
 public:
  // Throws std::invalid_argument for sizes that do not belong together or are too large. processors: see Pool.
  Engine(const Config& config, int threads, const Kernels& kernels, KVFormat kv, const std::vector<int>& processors = {});

  // Bytes must stay valid; a size that does not fit the config is refused. format is used for matrices only.
  void set_matrix(const std::string& name, Format format, const uint8_t* data, size_t bytes);
  void set_vector(const std::string& name, const float* data, size_t count);
  void check_complete() const;

  // A run-time adapter without parts yet; returns its number. Parts are bf16 matrices, (rank, inputs) and (outputs, rank), behind the
  // product with the matrix of this name; the parts of q, k and v are behind "...qkv_proj.left.weight" and see the block's whole input.
  int add_adapter();
  void add_part(int adapter, const std::string& name, int column, int rank, int outputs, int inputs, const uint8_t* down, size_t down_bytes, const uint8_t* up, size_t up_bytes,
                float scale);

  State new_state(int adapter = -1) const;
  bool made(const State& state) const;  // whether this engine, and no other, may read and change it
  // Reads every call's tokens; writes its logits, (call.logits, vocab), one behind the other. States are updated in place:
  // an exception leaves those of the call broken. Throws std::domain_error if a logit is not finite, std::invalid_argument
  // for calls that are too long and states of another engine, OutOfMemory. One thread at a time, others wait. A recorded call of at
  // most kMostRows tokens leaves convolution and scan where they were, until `keep`, or the next call, which keeps all of its tokens.
  void forward(const std::vector<Call>& calls, float* logits);
  // Of a recorded call's tokens only the first n stay read: the same bits as reading those alone. -1: all, if there are any. Throws
  // std::invalid_argument, OutOfMemory.
  void keep(State& state, int n);

  const Config config;
  const PageLayout layout;
  const std::shared_ptr<Blocks> pages, convs, ssms;  // the memory of states, which may outlive the engine
  Observer observer;        // every block's output under its name
  Observer input_observer;  // every product's input rows, as they are before rounding, under its matrix's name
  const Kernels& kernels;
  int threads() const { return pool_.size(); }

 private:
  struct Mixer {
    Matrix in_proj, out_proj;
    std::vector<float> conv_weight, conv_bias, dt_bias, A, D, norm;
  };
  struct Layer {
    int index, position = -1, block = -1;
    Matrix linear;
    std::vector<float> norm;
    Mixer mamba;
  };
  struct Adapter {
    Matrix down, up;
  };
  struct Block {
    std::vector<float> norm, pre_ff_norm;
    Matrix left, right, o_proj, gate_up, down;
    std::unordered_map<int, Adapter> adapters, qkv[3];
  };
  struct Segment {  // one sequence's tokens among the rows of a call
    State* state;
    int start, length;
    Record* record = nullptr;
  };
  struct Buffers;

  void read(const std::vector<Call>& calls, float* logits);
  std::string needs(const std::vector<Call>& calls) const;
  void run(const std::vector<Segment>& segments, const int32_t* tokens, int rows, bool many, const std::vector<int>& wanted, float* logits);
  void shared_block(const Layer& layer, const std::vector<Segment>& segments, bool many);
  void attention(const Layer& layer, const std::vector<Segment>& segments, bool many);
  void mixer(const Layer& layer, const std::vector<Segment>& segments, bool many);
  void multiply(const Matrix& w, const float* x, size_t stride, int rows, bool many, float* y);
  // Behind a product of rows [from, from + rows) of a call: what the run-time adapters of its sequences add. y: rows of `width` values.
  void adapt(const Matrix& w, const std::vector<Segment>& segments, const float* x, size_t stride, int from, int rows, bool many, float* y, size_t width);
  void add_low_rank(const Matrix& down, const Matrix& up, float scale, const float* x, size_t stride, int rows, bool many, float* y, size_t width);
  // f(row) for every row, by all threads where there are many rows.
  template <class F>
  void each_row(int rows, F&& f) {
    auto part = [&](int first, int last, int) {
      for (int r = first; r < last; ++r) f(static_cast<size_t>(r));
    };
    if (rows > 1) pool_.share(rows, part);
    else part(0, rows, 0);
  }
  void norm_rows(const float* x, const std::vector<float>& weight, int rows, int n, float* y);
  void append(Cache& cache, int length, const float* kv, size_t stride);
  void observe(const std::string& name, const float* data, int rows, int cols);
  void observe_input(const Matrix& w, const float* x, size_t stride, int rows);
  void own(State& state);
  void go_on(State& state, int n);
  void step(const Mixer& m, int h, const float* xbc, float dt, float* S, float* y) const;
  uint16_t* panel(int thread, size_t values);
  std::shared_ptr<Lora> adapter_of(int number) const;  // throws std::invalid_argument if there is none

  Matrix embeddings_, head_;
  std::vector<float> final_norm_;
  std::vector<Layer> layers_;
  std::vector<Block> blocks_;
  mutable std::mutex loras_mutex_;  // a new state does not wait for a call on others
  std::vector<std::shared_ptr<Lora>> loras_;
  std::unordered_map<std::string, Matrix*> matrices_;
  std::unordered_map<std::string, std::pair<std::vector<float>*, size_t>> vectors_;
  std::unordered_map<std::string, bool> seen_;
  const uint8_t *lowest_ = nullptr, *highest_ = nullptr;  // of the matrices' bytes
  std::mutex one_at_a_time_;
  Pool pool_;
  std::unique_ptr<Buffers> b_;
  Activations activations_;
  std::vector<std::vector<uint16_t>> panels_;  // one of each for every thread
  std::vector<std::vector<float>> scratch_;
  std::vector<std::shared_ptr<Record>> spare_;  // records whose memory the next ones take

 public:
  ~Engine();
};

}  // namespace zamba2
