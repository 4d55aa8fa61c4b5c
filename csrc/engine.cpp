#include "engine.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>

#include "mapped.h"

namespace zamba2 {

namespace {

constexpr float kMixerEps = 1e-5f;    // fixed, whatever the config's own epsilon is
constexpr int kGrain = 4;                // blocks of a matrix, or heads of a scan, that a thread takes at once in short calls
constexpr int kMlpRows = 64;             // of a long call that the MLP takes at once
constexpr size_t kPanelBytes = 1 << 20;  // of dequantized weights, so that they stay in a second-level cache

float half_to_float(uint16_t h) {
  const float sign = h & 0x8000 ? -1.0f : 1.0f;
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25) : std::ldexp(static_cast<float>(mantissa), -24));
}

// One row of a packed matrix as floats.
void read_row(const Matrix& w, int row, float* out) {
  const uint8_t* block = w.data + w.block_bytes() * static_cast<size_t>(row / 16);
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + w.code_bytes());
  const int lane = row % 16;
  for (int c = 0; c < w.cols; ++c) {
    const int g = c / 32, k = c % 32;
    if (w.format == Format::bf16) {
      uint16_t value;
      std::memcpy(&value, block + static_cast<size_t>(g) * 1024 + (k / 2) * 64 + lane * 4 + (k % 2) * 2, 2);
      const uint32_t bits = static_cast<uint32_t>(value) << 16;
      std::memcpy(&out[c], &bits, 4);
      continue;
    }
    int code;
    if (w.format == Format::q8) {
      code = block[static_cast<size_t>(g) * 512 + (k / 4) * 64 + lane * 4 + k % 4] - 128;
    } else {
      const int kk = k % 16;
      const uint8_t byte = block[static_cast<size_t>(g) * 256 + (kk / 4) * 64 + lane * 4 + kk % 4];
      code = (k < 16 ? byte & 15 : byte >> 4) - 8;
    }
    uint16_t scale;
    std::memcpy(&scale, scales + g * 16 + lane, 2);
    out[c] = static_cast<float>(code) * half_to_float(scale);
  }
}

// A config whose sizes the code below can compute with: positive, of one piece, and no product of ints too large.
const Config& checked(const Config& c) {
  auto need = [](bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(std::string("the config's sizes do not fit each other or are too large: ") + what);
  };
  const int positive[] = {c.hidden_size, c.num_hidden_layers, c.vocab_size, c.num_mem_blocks, c.mamba_d_state, c.n_mamba_heads, c.mamba_headdim, c.mamba_ngroups,
                          c.d_inner, c.conv_dim, c.in_proj_dim, c.num_attention_heads, c.num_key_value_heads, c.attention_head_dim, c.intermediate_size, c.adapter_rank};
  for (int size : positive) need(size > 0 && size <= kWidest, "every size must lie between 1 and 2097152");
  auto times = [](int a, int b) { return static_cast<int64_t>(a) * b; };
  need(c.num_hidden_layers <= 4096, "num_hidden_layers");
  need(c.mamba_d_conv > 1 && times(c.conv_dim, c.mamba_d_conv) < INT_MAX, "mamba_d_conv");
  need(times(c.n_mamba_heads, c.mamba_headdim) == c.d_inner && times(c.mamba_headdim, c.mamba_d_state) < INT_MAX / 2, "the Mamba2 heads");
  need(c.n_mamba_heads % c.mamba_ngroups == 0 && c.conv_dim == c.d_inner + 2 * times(c.mamba_ngroups, c.mamba_d_state), "conv_dim");
  need(c.in_proj_dim == c.d_inner + c.conv_dim + c.n_mamba_heads, "in_proj_dim");
  need(times(c.num_attention_heads, c.attention_head_dim) == 2 * c.hidden_size && c.num_attention_heads % c.num_key_value_heads == 0, "the attention heads");
  need(c.q_rows() + 2 * times(c.num_key_value_heads, c.attention_head_dim) <= kWidest && 2 * times(c.intermediate_size, 1) <= kWidest, "the shared blocks");
  int last = -1;
  for (int id : c.hybrid_layer_ids) {
    need(id > last && id < c.num_hidden_layers, "hybrid_layer_ids");
    last = id;
  }
  return c;
}

}  // namespace

struct Engine::Buffers {
  std::vector<float> conv, x, x0, square0, u, left, right, o, m, projected, adapted, low, f, t, xbc, dt, scores, final, scale, lora_low, lora_out;
  std::vector<float> wide;   // q, k and v; then in_proj's output
  std::vector<float> mixed;  // attention's output; then the scan's, gated in place
  std::vector<std::vector<float>> hoisted;  // of each block, once its first position has been there
  std::vector<bool> ready;
  std::vector<float> cosines, sines;
};

Engine::~Engine() = default;

size_t State::bytes() const {
  size_t total = ((conv ? conv->size() : 0) + (ssm ? ssm->size() : 0) + (record ? record->inputs.size() + record->dt.size() : 0)) * 4;
  for (const Cache& cache : caches)
    for (const auto& page : cache.pages) total += page->blocks->bytes;
  return total;
}

PageLayout::PageLayout(KVFormat format, int heads, int d) : format(format), heads(heads), bytes(0) {
  const size_t row = static_cast<size_t>(d) * (format == KVFormat::bf16 ? 2 : 1), scale = sizeof(float);
  for (const size_t width : format == KVFormat::bf16 ? std::vector{row, row} : std::vector{row, row, scale, scale}) {
    parts.push_back({bytes, width});
    bytes += static_cast<size_t>(heads) * kPage * width;
  }
}

KeysValues PageLayout::head(int h, const uint8_t* const* pages) const {
  auto at = [&](size_t part) { return part < parts.size() ? parts[part].offset + static_cast<size_t>(h) * kPage * parts[part].row : 0; };
  return {format, pages, at(0), at(1), at(2), at(3)};
}

Engine::Engine(const Config& c, int threads, const Kernels& k, KVFormat kv, const std::vector<int>& processors)
    : config(checked(c)), layout(kv, c.num_key_value_heads, c.attention_head_dim),
      pages(std::make_shared<Blocks>(layout.bytes)),
      convs(std::make_shared<Blocks>(sizeof(float) * static_cast<size_t>(c.num_hidden_layers) * static_cast<size_t>(c.mamba_d_conv - 1) * c.conv_dim)),
      ssms(std::make_shared<Blocks>(sizeof(float) * static_cast<size_t>(c.num_hidden_layers) * static_cast<size_t>(c.d_inner) * c.mamba_d_state)), kernels(k), pool_(threads, processors), b_(std::make_unique<Buffers>()) {
  panels_.resize(static_cast<size_t>(pool_.size()));
  scratch_.assign(static_cast<size_t>(pool_.size()), std::vector<float>(chunk_scratch(c.mamba_headdim, c.mamba_d_state)));
  const int hidden = c.hidden_size, wide = 2 * hidden, positions = static_cast<int>(c.hybrid_layer_ids.size());
  auto matrix = [&](const std::string& name, Matrix& m, int rows, int cols) {
    m.rows = rows;
    m.cols = cols;
    matrices_[name] = &m;
  };
  auto vector = [&](const std::string& name, std::vector<float>& v, int count) { vectors_[name] = {&v, static_cast<size_t>(count)}; };
  matrix("embed_tokens.weight", embeddings_, c.vocab_size, hidden);
  if (!c.tie_word_embeddings) matrix("lm_head.weight", head_, c.vocab_size, hidden);
  vector("final_layernorm.weight", final_norm_, hidden);
  layers_.resize(static_cast<size_t>(c.num_hidden_layers));
  blocks_.resize(static_cast<size_t>(std::min(c.num_mem_blocks, positions)));
  for (int i = 0; i < c.num_hidden_layers; ++i) {
    Layer& layer = layers_[static_cast<size_t>(i)];
    layer.index = i;
    const auto found = std::find(c.hybrid_layer_ids.begin(), c.hybrid_layer_ids.end(), i);
    const std::string name = "layers." + std::to_string(i);
    if (found != c.hybrid_layer_ids.end()) {
      layer.position = static_cast<int>(found - c.hybrid_layer_ids.begin());
      layer.block = layer.position % c.num_mem_blocks;
      matrix(name + ".linear.weight", layer.linear, hidden, hidden);
    }
    Mixer& m = layer.mamba;
    vector(name + ".input_layernorm.weight", layer.norm, hidden);
    matrix(name + ".mamba.in_proj.weight", m.in_proj, c.in_proj_dim, hidden);
    matrix(name + ".mamba.out_proj.weight", m.out_proj, hidden, c.d_inner);
    vector(name + ".mamba.conv1d.weight", m.conv_weight, c.conv_dim * c.mamba_d_conv);
    vector(name + ".mamba.conv1d.bias", m.conv_bias, c.conv_dim);
    vector(name + ".mamba.dt_bias", m.dt_bias, c.n_mamba_heads);
    vector(name + ".mamba.A_log", m.A, c.n_mamba_heads);
    vector(name + ".mamba.D", m.D, c.n_mamba_heads);
    vector(name + ".mamba.norm.weight", m.norm, c.d_inner);
  }
  const int rows = c.q_rows() + 2 * c.kv_rows();
  for (int b = 0; b < static_cast<int>(blocks_.size()); ++b) {
    Block& block = blocks_[static_cast<size_t>(b)];
    const std::string name = "shared_blocks." + std::to_string(b);
    vector(name + ".input_layernorm.weight", block.norm, wide);
    vector(name + ".pre_ff_layernorm.weight", block.pre_ff_norm, hidden);
    matrix(name + ".self_attn.qkv_proj.left.weight", block.left, rows, hidden);
    matrix(name + ".self_attn.qkv_proj.right.weight", block.right, rows, hidden);
    matrix(name + ".self_attn.o_proj.weight", block.o_proj, hidden, c.q_rows());
    matrix(name + ".feed_forward.gate_up_proj.weight", block.gate_up, 2 * c.intermediate_size, hidden);
    matrix(name + ".feed_forward.down_proj.weight", block.down, hidden, c.intermediate_size);
    for (int j = b; j < positions; j += c.num_mem_blocks) {
      const std::string own = ".feed_forward.gate_up_proj_adapter_list." + std::to_string(j);
      matrix(name + own + ".0.weight", block.adapters[j].down, c.adapter_rank, hidden);
      matrix(name + own + ".1.weight", block.adapters[j].up, 2 * c.intermediate_size, c.adapter_rank);
      for (int part = 0; c.use_shared_attention_adapter && part < 3; ++part) {
        const std::string list = std::string(".self_attn.linear_") + "qkv"[part] + "_adapter_list." + std::to_string(j);
        matrix(name + list + ".0.weight", block.qkv[part][j].down, c.adapter_rank, wide);
        matrix(name + list + ".1.weight", block.qkv[part][j].up, part ? c.kv_rows() : c.q_rows(), c.adapter_rank);
      }
    }
  }
}

void Engine::set_matrix(const std::string& name, Format format, const uint8_t* data, size_t bytes) {
  const auto found = matrices_.find(name);
  if (found == matrices_.end()) throw std::invalid_argument("the model has no matrix " + name);
  Matrix m = *found->second;
  m.format = format;
  if (bytes != m.bytes())
    throw std::invalid_argument("matrix " + name + " has " + std::to_string(bytes) + " bytes; its shape and format need " + std::to_string(m.bytes()));
  m.data = data;
  *found->second = m;
  if (!lowest_ || data < lowest_) lowest_ = data;
  if (!highest_ || data + bytes > highest_) highest_ = data + bytes;
  if (name == "embed_tokens.weight" && config.tie_word_embeddings) head_ = m;
  seen_[name] = true;
}

void Engine::set_vector(const std::string& name, const float* data, size_t count) {
  const auto found = vectors_.find(name);
  if (found == vectors_.end()) throw std::invalid_argument("the model has no vector " + name);
  if (count != found->second.second)
    throw std::invalid_argument("vector " + name + " has " + std::to_string(count) + " values; " + std::to_string(found->second.second) + " are needed");
  std::vector<float>& v = *found->second.first;
  v.assign(data, data + count);
  if (name.ends_with(".A_log"))
    for (float& a : v) a = -std::exp(a);
  if (name.ends_with("conv1d.weight")) {  // (C, taps) -> (taps, C), so that a tap's weights lie side by side
    const size_t taps = static_cast<size_t>(config.mamba_d_conv), n = count / taps;
    for (size_t i = 0; i < n; ++i)
      for (size_t tap = 0; tap < taps; ++tap) v[tap * n + i] = data[i * taps + tap];
  }
  seen_[name] = true;
}

void Engine::check_complete() const {
  for (const auto& [name, unused] : matrices_)
    if (!seen_.contains(name)) throw std::invalid_argument("matrix " + name + " is missing");
  for (const auto& [name, unused] : vectors_)
    if (!seen_.contains(name)) throw std::invalid_argument("vector " + name + " is missing");
}

int Engine::add_adapter() {
  const std::lock_guard<std::mutex> alone(loras_mutex_);
  loras_.push_back(std::make_shared<Lora>());
  return static_cast<int>(loras_.size()) - 1;
}

void Engine::add_part(int adapter, const std::string& name, int column, int rank, int outputs, int inputs, const uint8_t* down, size_t down_bytes, const uint8_t* up,
                      size_t up_bytes, float scale) {
  const std::lock_guard<std::mutex> alone(one_at_a_time_);
  const std::shared_ptr<Lora> lora = adapter_of(adapter);
  const auto found = matrices_.find(name);
  if (found == matrices_.end()) throw std::invalid_argument("the model has no matrix " + name);
  const Matrix& w = *found->second;
  const bool qkv = name.ends_with("qkv_proj.left.weight");
  if (rank < 1 || outputs < 1 || column < 0 || rank > kWidest || outputs > w.rows || column > w.rows - outputs || inputs != (qkv ? 2 * w.cols : w.cols))
    throw std::invalid_argument("the adapter's part for " + name + " does not fit it");
  Lora::Part part{};
  for (auto [m, rows, cols, data, bytes] : {std::tuple(&part.down, rank, inputs, down, down_bytes), std::tuple(&part.up, outputs, rank, up, up_bytes)}) {
    m->rows = rows;
    m->cols = cols;
    m->format = Format::bf16;
    m->data = data;
    if (bytes != m->bytes()) throw std::invalid_argument("the adapter's part for " + name + " has the wrong number of bytes");
  }
  part.column = column;
  part.scale = scale;
  lora->parts[&w].push_back(part);
}

std::shared_ptr<Lora> Engine::adapter_of(int number) const {
  const std::lock_guard<std::mutex> alone(loras_mutex_);
  if (number < 0 || number >= static_cast<int>(loras_.size())) throw std::invalid_argument("there is no such adapter");
  return loras_[static_cast<size_t>(number)];
}

State Engine::new_state(int adapter) const {
  State state;
  if (adapter != -1) state.lora = adapter_of(adapter);
  state.caches.resize(config.hybrid_layer_ids.size());
  return state;
}

bool Engine::made(const State& state) const {
  const std::lock_guard<std::mutex> alone(loras_mutex_);
  return state.caches.size() == config.hybrid_layer_ids.size() && (!state.conv || state.conv->blocks == convs) &&
         (!state.lora || std::find(loras_.begin(), loras_.end(), state.lora) != loras_.end());
}

void Engine::own(State& state) {
  auto make = [](std::shared_ptr<Values>& p, const std::shared_ptr<Blocks>& blocks) {
    if (p && p.use_count() == 1) return std::atomic_thread_fence(std::memory_order_acquire);  // another thread may have read it until just now, to save it
    const auto made = std::make_shared<Values>(blocks);
    if (p) std::copy(p->begin(), p->end(), made->begin());
    else std::fill(made->begin(), made->end(), 0.0f);
    p = made;
  };
  make(state.conv, convs);
  make(state.ssm, ssms);
}

void Engine::observe(const std::string& name, const float* data, int rows, int cols) {
  if (observer) observer(name, data, rows, cols);
}

void Engine::observe_input(const Matrix& w, const float* x, size_t stride, int rows) {
  const auto found = std::find_if(matrices_.begin(), matrices_.end(), [&](const auto& named) { return named.second == &w; });
  if (found == matrices_.end() && &w != &head_) return;  // of a run-time adapter
  std::vector<float> inputs;
  for (int r = 0; r < rows; ++r) inputs.insert(inputs.end(), x + static_cast<size_t>(r) * stride, x + static_cast<size_t>(r) * stride + w.cols);
  input_observer(found == matrices_.end() ? "embed_tokens.weight" : found->first, inputs.data(), rows, w.cols);  // a tied head is a copy
}

// What the calls need in memory: their states, keys and values, and about what `run` works in.
std::string Engine::needs(const std::vector<Call>& calls) const {
  const Config& c = config;
  const size_t widths = 12 * static_cast<size_t>(c.hidden_size) + 4 * static_cast<size_t>(c.q_rows() + c.kv_rows()) + 6 * static_cast<size_t>(c.intermediate_size) +
                        static_cast<size_t>(c.in_proj_dim) + static_cast<size_t>(c.conv_dim) + 2 * static_cast<size_t>(c.d_inner);
  const size_t state = 4 * static_cast<size_t>(c.num_hidden_layers) * (static_cast<size_t>(c.mamba_d_conv - 1) * c.conv_dim + static_cast<size_t>(c.d_inner) * c.mamba_d_state);
  size_t caches = 0, rows = std::min<size_t>(64, calls.size() * kMostRows);
  for (const Call& call : calls) {
    caches += layout.bytes * static_cast<size_t>((call.state->position + call.length + kPage - 1) / kPage) * call.state->caches.size();
    rows = std::max(rows, static_cast<size_t>(call.length));
  }
  return std::to_string(state * calls.size()) + " bytes of state, " + std::to_string(caches) + " of keys and values and about " + std::to_string(4 * widths * rows) + " to work in are needed";
}

void Engine::forward(const std::vector<Call>& calls, float* logits) {
  const std::lock_guard<std::mutex> alone(one_at_a_time_);
  const int widest = std::max({config.vocab_size, config.in_proj_dim, config.q_rows() + 2 * config.kv_rows(), 2 * config.intermediate_size, 2 * config.hidden_size});
  for (const Call& call : calls) {
    if (!made(*call.state)) throw std::invalid_argument("the state belongs to another model");
    if (call.record && call.length > kMostRows) throw std::invalid_argument("at most " + std::to_string(kMostRows) + " tokens can be recorded");
    if (call.length > INT_MAX / widest) throw std::invalid_argument("a call of " + std::to_string(call.length) + " tokens is too long for this model; read them in parts");
    if (call.length > kMostTokens - call.state->position) throw std::invalid_argument("a state holds at most " + std::to_string(kMostTokens) + " tokens");
  }
  const GuardMapped guard(lowest_, highest_);
  const Pinned pinned(pool_.processors());
  const NoDenormals plain;
  try {
    read(calls, logits);
  } catch (const std::bad_alloc&) {
    throw OutOfMemory(needs(calls));
  }
}

void Engine::read(const std::vector<Call>& calls, float* logits) {
  // Short calls together, in groups that one pass over the weights serves; long ones each by itself. What a token's
  // arithmetic is depends on its own call's length alone, never on its company.
  std::vector<float*> outputs;
  for (const Call& call : calls) {
    outputs.push_back(logits);
    logits += static_cast<size_t>(call.logits) * config.vocab_size;
    if (call.state->broken) throw std::invalid_argument("an earlier call on this state failed midway; start a new one or load a saved one");
  }
  const float* const all = outputs.empty() ? logits : outputs.front();
  for (const Call& call : calls) call.state->broken = true;
  for (const Call& call : calls) {
    if (call.state->record) go_on(*call.state, call.state->record->length);
    if (!call.record || !call.state->ssm) own(*call.state);
  }
  std::vector<std::shared_ptr<Record>> records(calls.size());
  std::vector<Segment> segments;
  std::vector<int32_t> tokens;
  std::vector<int> wanted;
  std::vector<float*> places;
  std::vector<float> gathered;
  auto flush = [&] {
    if (tokens.empty()) return;
    gathered.resize(wanted.size() * static_cast<size_t>(config.vocab_size));
    run(segments, tokens.data(), static_cast<int>(tokens.size()), false, wanted, gathered.data());
    for (size_t i = 0; i < wanted.size(); ++i)
      std::memcpy(places[i], gathered.data() + i * config.vocab_size, sizeof(float) * static_cast<size_t>(config.vocab_size));
    segments.clear();
    tokens.clear();
    wanted.clear();
    places.clear();
  };
  for (size_t i = 0; i < calls.size(); ++i) {
    const Call& call = calls[i];
    if (call.length > kMostRows) {
      std::vector<int> rows;
      for (int r = call.length - call.logits; r < call.length; ++r) rows.push_back(r);
      run({{call.state, 0, call.length}}, call.tokens, call.length, true, rows, outputs[i]);
      continue;
    }
    if (static_cast<int>(tokens.size()) + call.length > 64) flush();
    const int start = static_cast<int>(tokens.size());
    if (call.record) {
      const size_t of_all = static_cast<size_t>(config.num_hidden_layers) * static_cast<size_t>(call.length);
      if (spare_.empty()) spare_.push_back(std::make_shared<Record>());
      records[i] = std::move(spare_.back());
      spare_.pop_back();
      records[i]->length = call.length;
      records[i]->inputs.resize(of_all * static_cast<size_t>(config.conv_dim));
      records[i]->dt.resize(of_all * static_cast<size_t>(config.n_mamba_heads));
    }
    segments.push_back({call.state, start, call.length, records[i].get()});
    tokens.insert(tokens.end(), call.tokens, call.tokens + call.length);
    for (int r = 0; r < call.logits; ++r) {
      wanted.push_back(start + call.length - call.logits + r);
      places.push_back(outputs[i] + static_cast<size_t>(r) * config.vocab_size);
    }
  }
  flush();
  if (!kernels.finite(all, static_cast<size_t>(logits - all))) throw std::domain_error("the model computed values that are not finite");
  for (size_t i = 0; i < calls.size(); ++i) {
    calls[i].state->record = std::move(records[i]);
    calls[i].state->broken = false;
  }
}

void Engine::keep(State& state, int n) {
  if (n < 0 && !state.record) return;  // without waiting for a call on other states
  const std::lock_guard<std::mutex> alone(one_at_a_time_);
  if (!made(state)) throw std::invalid_argument("the state belongs to another model");
  if (state.broken) throw std::invalid_argument("an earlier call on this state failed midway; start a new one or load a saved one");
  if (!state.record) throw std::invalid_argument("cannot keep " + std::to_string(n) + " tokens: nothing was recorded");
  if (n < 0) n = state.record->length;
  if (n > state.record->length) throw std::invalid_argument("cannot keep " + std::to_string(n) + " tokens: " + std::to_string(state.record->length) + " were recorded");
  const Pinned pinned(pool_.processors());
  const NoDenormals plain;
  state.broken = true;
  try {
    go_on(state, n);
  } catch (const std::bad_alloc&) {
    throw OutOfMemory("a state of its own is needed");
  }
  state.broken = false;
}

// Convolution and scan read the first n tokens of the recorded call; the others are taken back.
void Engine::go_on(State& state, int n) {
  const Config& c = config;
  const std::shared_ptr<Record> record = std::move(state.record);
  if (record.use_count() == 1 && spare_.size() < kMostRows) spare_.push_back(record);
  state.position += n - record->length;
  for (Cache& cache : state.caches) {
    cache.length = state.position;
    cache.pages.resize(static_cast<size_t>((cache.length + kPage - 1) / kPage));
    if (!cache.pages.empty() && cache.pages.back().use_count() == 1) cache.pages.back()->used = cache.length - (static_cast<int>(cache.pages.size()) - 1) * kPage;
  }
  if (n == 0) return;
  own(state);
  Buffers& b = *b_;
  const int heads = c.n_mamba_heads, P = c.mamba_headdim, N = c.mamba_d_state, taps = c.mamba_d_conv, per_group = heads / c.mamba_ngroups;
  const size_t conv_dim = static_cast<size_t>(c.conv_dim), length = static_cast<size_t>(record->length), kept = static_cast<size_t>(n);
  b.xbc.resize(static_cast<size_t>(c.num_hidden_layers) * kept * conv_dim);
  b.mixed.resize(static_cast<size_t>(pool_.size()) * static_cast<size_t>(P));  // the scan's outputs, which nobody needs
  pool_.take(c.num_hidden_layers, [&](int index, int) {
    const size_t layer = static_cast<size_t>(index);
    const Mixer& m = layers_[layer].mamba;
    kernels.convolve(record->inputs.data() + layer * length * conv_dim, conv_dim, n, m.conv_weight.data(), m.conv_bias.data(), taps, c.conv_dim, 0, c.conv_dim,
                     state.conv->data() + layer * static_cast<size_t>(taps - 1) * conv_dim, b.xbc.data() + layer * kept * conv_dim);
  });
  pool_.take(c.num_hidden_layers * c.mamba_ngroups, [&](int item, int thread) {
    const size_t layer = static_cast<size_t>(item / c.mamba_ngroups);
    const int group = item % c.mamba_ngroups;
    for (int h = group * per_group; h < (group + 1) * per_group; ++h) {
      float* S = state.ssm->data() + (layer * static_cast<size_t>(heads) + static_cast<size_t>(h)) * static_cast<size_t>(P) * N;
      for (size_t t = 0; t < kept; ++t)
        step(layers_[layer].mamba, h, b.xbc.data() + (layer * kept + t) * conv_dim, record->dt[(layer * length + t) * static_cast<size_t>(heads) + static_cast<size_t>(h)], S,
             b.mixed.data() + static_cast<size_t>(thread) * P);
    }
  });
}

// One token of one head. xbc: behind the convolution; S: (P, N); y: (P).
void Engine::step(const Mixer& m, int h, const float* xbc, float dt, float* S, float* y) const {
  const size_t head = static_cast<size_t>(h), P = static_cast<size_t>(config.mamba_headdim), N = static_cast<size_t>(config.mamba_d_state);
  const float* B = xbc + config.d_inner + static_cast<size_t>(h / (config.n_mamba_heads / config.mamba_ngroups)) * N;
  kernels.step(xbc + head * P, dt, std::exp(dt * m.A[head]), B, B + static_cast<size_t>(config.mamba_ngroups) * N, m.D[head], config.mamba_headdim, config.mamba_d_state, S, y);
}

uint16_t* Engine::panel(int thread, size_t values) {
  std::vector<uint16_t>& room = panels_[static_cast<size_t>(thread)];
  if (room.size() < values + 32) room.resize(values + 32);
  return reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(room.data()) + 63) / 64 * 64);
}

void Engine::multiply(const Matrix& w, const float* x, size_t stride, int rows, bool many, float* y) {
  if (input_observer) observe_input(w, x, stride, rows);
  Activations& a = activations_;
  a.rows = rows;
  a.cols = w.cols;
  const size_t line = static_cast<size_t>(a.stride());
  if (many && kernels.halves(w.format)) {
    a.halves.resize(static_cast<size_t>(rows + 31) / 32 * 32 * line);
    pool_.share(static_cast<int>((static_cast<size_t>(rows) + 31) / 32 * 32), [&](int first, int last, int) {
      for (int r = first; r < last; ++r) kernels.to_tiles(x + static_cast<size_t>(std::min(r, rows - 1)) * stride, w.cols, r, a.halves.data());
    });
    const size_t block_bytes = static_cast<size_t>(w.groups()) * 1024;
    const int per_panel = std::max(2, static_cast<int>(kPanelBytes / block_bytes) / 2 * 2);
    const int fair = (w.blocks() + 4 * pool_.size() - 1) / (4 * pool_.size());
    const int step = std::clamp(std::min(per_panel, (fair + 1) / 2 * 2), 2, kMostPanelBlocks);
    const size_t values = w.format == Format::bf16 ? 0 : static_cast<size_t>(step) * static_cast<size_t>(w.groups()) * 512;
    for (int thread = 0; thread < pool_.size(); ++thread) panel(thread, values);  // here, since a worker that throws ends the program
    pool_.take((w.blocks() + step - 1) / step, [&](int item, int thread) {
      uint16_t* room = panel(thread, values);
      kernels.multiply_many(w, item * step, std::min(w.blocks(), (item + 1) * step), a, y, static_cast<size_t>(w.rows), room);
    });
    return;
  }
  if (w.format == Format::bf16) {
    a.values.resize(static_cast<size_t>(rows) * line);
    for (int r = 0; r < rows; ++r) {
      float* to = a.values.data() + static_cast<size_t>(r) * line;
      std::memcpy(to, x + static_cast<size_t>(r) * stride, sizeof(float) * static_cast<size_t>(w.cols));
      std::fill(to + w.cols, to + line, 0.0f);
    }
  } else {
    const size_t groups = static_cast<size_t>(a.groups());
    a.codes.resize(static_cast<size_t>(rows) * line);
    a.scales.resize(static_cast<size_t>(rows) * groups);
    a.starts.resize(static_cast<size_t>(rows) * groups);
    auto quantize = [&](int first, int last, int) {
      for (int r = first; r < last; ++r) {
        const int tile = r / kMostRows * kMostRows;
        const size_t at = static_cast<size_t>(tile);
        kernels.quantize(x + static_cast<size_t>(r) * stride, w.cols, w.format, r - tile, std::min(kMostRows, rows - tile), a.codes.data() + at * line, a.scales.data() + at * groups, a.starts.data() + at * groups);
      }
    };
    if (rows > 4) pool_.share(rows, quantize);
    else quantize(0, rows, 0);
  }
  if (many) {
    const int step = std::clamp(w.blocks() / (8 * pool_.size()), 4, 16) / 2 * 2;  // long enough runs of blocks to fetch ahead; pairs
    pool_.take((w.blocks() + step - 1) / step, [&](int item, int) {
      kernels.multiply_many(w, item * step, std::min(w.blocks(), (item + 1) * step), a, y, static_cast<size_t>(w.rows), nullptr);
    });
    return;
  }
  pool_.balance(w.blocks(), kGrain, [&](int first, int last, int) {
    for (int row = 0; row < rows; row += kMostRows)
      kernels.multiply(w, first, last, a, row, y + static_cast<size_t>(row) * w.rows, static_cast<size_t>(w.rows));
  });
}

void Engine::add_low_rank(const Matrix& down, const Matrix& up, float scale, const float* x, size_t stride, int rows, bool many, float* y, size_t width) {
  Buffers& b = *b_;
  const size_t low = static_cast<size_t>(down.rows), out = static_cast<size_t>(up.rows);
  b.lora_low.resize(static_cast<size_t>(rows) * low);
  b.lora_out.resize(static_cast<size_t>(rows) * out);
  multiply(down, x, stride, rows, many, b.lora_low.data());
  multiply(up, b.lora_low.data(), low, rows, many, b.lora_out.data());
  each_row(rows, [&](size_t r) { kernels.add_scaled(b.lora_out.data() + r * out, scale, up.rows, y + r * width); });
}

void Engine::adapt(const Matrix& w, const std::vector<Segment>& segments, const float* x, size_t stride, int from, int rows, bool many, float* y, size_t width) {
  for (const Segment& s : segments) {
    if (!s.state->lora) continue;
    const int first = std::max(s.start, from), last = std::min(s.start + s.length, from + rows);
    const auto found = s.state->lora->parts.find(&w);
    if (first >= last || found == s.state->lora->parts.end()) continue;
    const size_t at = static_cast<size_t>(first - from);
    for (const Lora::Part& part : found->second) add_low_rank(part.down, part.up, part.scale, x + at * stride, stride, last - first, many, y + at * width + part.column, width);
  }
}

void Engine::norm_rows(const float* x, const std::vector<float>& weight, int rows, int n, float* y) {
  each_row(rows, [&](size_t r) {
    const float* from = x + r * static_cast<size_t>(n);
    const float scale = 1.0f / std::sqrt(kernels.sum_of_squares(from, n) / static_cast<float>(n) + config.rms_norm_eps);
    kernels.scale_by(from, weight.data(), scale, n, y + r * static_cast<size_t>(n));
  });
}

void Engine::run(const std::vector<Segment>& segments, const int32_t* tokens, int rows, bool many, const std::vector<int>& wanted, float* logits) {
  const Config& c = config;
  Buffers& b = *b_;
  const size_t n = static_cast<size_t>(rows), hidden = static_cast<size_t>(c.hidden_size);
  b.x.resize(n * hidden);
  b.square0.resize(n);
  b.scale.resize(n);
  for (int r = 0; r < rows; ++r) read_row(embeddings_, tokens[r], b.x.data() + static_cast<size_t>(r) * hidden);
  b.x0 = b.x;
  for (int r = 0; r < rows; ++r) b.square0[static_cast<size_t>(r)] = kernels.sum_of_squares(b.x0.data() + static_cast<size_t>(r) * hidden, c.hidden_size);
  b.hoisted.resize(blocks_.size());
  b.ready.assign(blocks_.size(), false);
  if (c.use_mem_rope) {
    const size_t half = static_cast<size_t>(c.attention_head_dim) / 2;
    b.cosines.resize(n * half);
    b.sines.resize(n * half);
    for (const Segment& s : segments)
      for (int t = 0; t < s.length; ++t)
        for (size_t i = 0; i < half; ++i) {
          const float frequency = static_cast<float>(std::pow(c.rope_base, -2.0 * static_cast<double>(i) / c.attention_head_dim));
          const float angle = static_cast<float>(s.state->position + t) * frequency;
          const size_t at = static_cast<size_t>(s.start + t) * half + i;
          b.cosines[at] = std::cos(angle);
          b.sines[at] = std::sin(angle);
        }
  }
  for (const Layer& layer : layers_) {
    b.u.resize(n * hidden);
    const std::string name = observer ? "layers." + std::to_string(layer.index) : std::string();
    if (layer.position >= 0) {
      shared_block(layer, segments, many);
      multiply(layer.linear, b.t.data(), hidden, rows, many, b.u.data());
      adapt(layer.linear, segments, b.t.data(), hidden, 0, rows, many, b.u.data(), hidden);
      observe(name + ".linear", b.u.data(), rows, c.hidden_size);
      each_row(rows, [&](size_t r) { kernels.add_scaled(b.x.data() + r * hidden, 1.0f, c.hidden_size, b.u.data() + r * hidden); });
    } else {
      std::copy(b.x.begin(), b.x.end(), b.u.begin());
    }
    norm_rows(b.u.data(), layer.norm, rows, c.hidden_size, b.u.data());
    mixer(layer, segments, many);
    observe(name + ".mamba", b.o.data(), rows, c.hidden_size);
    each_row(rows, [&](size_t r) { kernels.add_scaled(b.o.data() + r * hidden, 1.0f, c.hidden_size, b.x.data() + r * hidden); });
    observe(name, b.x.data(), rows, c.hidden_size);
  }
  for (const Segment& s : segments) s.state->position += s.length;
  if (wanted.empty()) return;
  b.final.resize(wanted.size() * hidden);
  for (size_t i = 0; i < wanted.size(); ++i)
    std::memcpy(b.final.data() + i * hidden, b.x.data() + static_cast<size_t>(wanted[i]) * hidden, sizeof(float) * hidden);
  norm_rows(b.final.data(), final_norm_, static_cast<int>(wanted.size()), c.hidden_size, b.final.data());
  observe("final_layernorm", b.final.data(), static_cast<int>(wanted.size()), c.hidden_size);
  multiply(head_, b.final.data(), hidden, static_cast<int>(wanted.size()), many && wanted.size() > kMostRows, logits);
}

void Engine::shared_block(const Layer& layer, const std::vector<Segment>& segments, bool many) {
  const Config& c = config;
  Buffers& b = *b_;
  const Block& block = blocks_[static_cast<size_t>(layer.block)];
  const int rows = static_cast<int>(b.square0.size()), hidden = c.hidden_size;
  const size_t n = static_cast<size_t>(rows), h = static_cast<size_t>(hidden), width = static_cast<size_t>(c.q_rows() + 2 * c.kv_rows());
  b.left.resize(n * h);
  b.wide.resize(n * width);
  each_row(rows, [&](size_t r) {
    const float* x = b.x.data() + r * h;
    const float square = kernels.sum_of_squares(x, hidden) + b.square0[r];
    b.scale[r] = 1.0f / std::sqrt(square / static_cast<float>(2 * hidden) + c.rms_norm_eps);
    kernels.scale_by(x, block.norm.data(), b.scale[r], hidden, b.left.data() + r * h);
  });
  const size_t which = static_cast<size_t>(layer.block);
  std::vector<float>& hoisted = b.hoisted[which];
  if (!b.ready[which]) {
    b.right.resize(n * h);
    hoisted.resize(n * width);
    each_row(rows, [&](size_t r) { kernels.scale_by(b.x0.data() + r * h, block.norm.data() + hidden, 1.0f, hidden, b.right.data() + r * h); });
    multiply(block.right, b.right.data(), h, rows, many, hoisted.data());
    b.ready[which] = true;
  }
  multiply(block.left, b.left.data(), h, rows, many, b.wide.data());
  each_row(rows, [&](size_t r) { kernels.add_scaled(hoisted.data() + r * width, b.scale[r], static_cast<int>(width), b.wide.data() + r * width); });
  const bool adapted = std::any_of(segments.begin(), segments.end(), [&](const Segment& s) { return s.state->lora && s.state->lora->parts.contains(&block.left); });
  if (c.use_shared_attention_adapter || adapted) {  // these see the whole of the normed [x, x0]
    b.f.resize(n * 2 * h);
    each_row(rows, [&](size_t r) {
      float* u = b.f.data() + r * 2 * h;
      std::memcpy(u, b.left.data() + r * h, sizeof(float) * h);
      kernels.scale_by(b.x0.data() + r * h, block.norm.data() + hidden, b.scale[r], hidden, u + h);
    });
    size_t offset = 0;
    for (int part = 0; c.use_shared_attention_adapter && part < 3; ++part) {
      const Adapter& adapter = block.qkv[part].at(layer.position);
      add_low_rank(adapter.down, adapter.up, 1.0f, b.f.data(), 2 * h, rows, many, b.wide.data() + offset, width);
      offset += static_cast<size_t>(adapter.up.rows);
    }
    adapt(block.left, segments, b.f.data(), 2 * h, 0, rows, many, b.wide.data(), width);
  }
  attention(layer, segments, many);
  b.o.resize(n * h);
  multiply(block.o_proj, b.mixed.data(), static_cast<size_t>(c.q_rows()), rows, many, b.o.data());
  adapt(block.o_proj, segments, b.mixed.data(), static_cast<size_t>(c.q_rows()), 0, rows, many, b.o.data(), h);
  const std::string name = observer ? "layers." + std::to_string(layer.index) + ".shared_block" : std::string();
  observe(name + ".self_attn", b.o.data(), rows, hidden);
  b.m.resize(n * h);
  norm_rows(b.o.data(), block.pre_ff_norm, rows, hidden, b.m.data());
  const size_t inner = static_cast<size_t>(c.intermediate_size);
  const Adapter& adapter = block.adapters.at(layer.position);
  b.t.resize(n * h);
  // Some rows at a time: the MLP's wide rows are the most memory that a long call needs. An observer sees whole products.
  const int slab = observer || input_observer ? rows : std::min(rows, kMlpRows);
  b.projected.resize(static_cast<size_t>(slab) * 2 * inner);
  b.adapted.resize(static_cast<size_t>(slab) * 2 * inner);
  b.low.resize(static_cast<size_t>(slab) * static_cast<size_t>(c.adapter_rank));
  b.f.resize(static_cast<size_t>(slab) * inner);
  for (int from = 0; from < rows; from += slab) {
    const int some = std::min(slab, rows - from);
    const float* m = b.m.data() + static_cast<size_t>(from) * h;
    multiply(block.gate_up, m, h, some, many, b.projected.data());
    adapt(block.gate_up, segments, m, h, from, some, many, b.projected.data(), 2 * inner);
    multiply(adapter.down, m, h, some, many, b.low.data());
    multiply(adapter.up, b.low.data(), static_cast<size_t>(c.adapter_rank), some, many, b.adapted.data());
    each_row(some, [&](size_t r) { kernels.geglu(b.projected.data() + r * 2 * inner, b.adapted.data() + r * 2 * inner, c.intermediate_size, b.f.data() + r * inner); });
    multiply(block.down, b.f.data(), inner, some, many, b.t.data() + static_cast<size_t>(from) * h);
    adapt(block.down, segments, b.f.data(), inner, from, some, many, b.t.data() + static_cast<size_t>(from) * h, h);
  }
  observe(name, b.t.data(), rows, hidden);
}

// Room for `length` more tokens and their keys and values, (length, stride): keys of all heads, then values.
void Engine::append(Cache& cache, int length, const float* kv, size_t stride) {
  const int end = cache.length + length, rest = cache.length % kPage, heads = layout.heads, d = config.attention_head_dim;
  if (rest && cache.pages.back()->used != rest) {  // another state went on in this page
    const auto own = std::make_shared<Page>(pages);
    for (const PageLayout::Part& part : layout.parts)
      for (int h = 0; h < heads; ++h) {
        const size_t at = part.offset + static_cast<size_t>(h) * kPage * part.row;
        std::memcpy(own->data + at, cache.pages.back()->data + at, static_cast<size_t>(rest) * part.row);
      }
    cache.pages.back() = own;
  }
  while (static_cast<int>(cache.pages.size()) * kPage < end) cache.pages.push_back(std::make_shared<Page>(pages));
  auto store = [&](int first, int last, int) {
    for (int t = first; t < last; ++t) {
      uint8_t* page = cache.pages[static_cast<size_t>((cache.length + t) / kPage)]->data;
      for (int part = 0; part < 2; ++part)
        for (int h = 0; h < heads; ++h) {
          const float* x = kv + static_cast<size_t>(t) * stride + static_cast<size_t>(part * heads + h) * static_cast<size_t>(d);
          const size_t row = static_cast<size_t>(h) * kPage + static_cast<size_t>((cache.length + t) % kPage);
          auto place = [&](int which) { return page + layout.parts[static_cast<size_t>(which)].offset + row * layout.parts[static_cast<size_t>(which)].row; };
          if (layout.format == KVFormat::bf16) kernels.to_bf16(x, d, reinterpret_cast<uint16_t*>(place(part)));
          else kernels.to_q8(x, d, reinterpret_cast<int8_t*>(place(part)), reinterpret_cast<float*>(place(part + 2)));
        }
    }
  };
  if (length > kMostRows) pool_.share(length, store);
  else store(0, length, 0);
  for (int page = cache.length / kPage; page * kPage < end; ++page) cache.pages[static_cast<size_t>(page)]->used = std::min(kPage, end - page * kPage);
  cache.length = end;
}

void Engine::attention(const Layer& layer, const std::vector<Segment>& segments, bool many) {
  const Config& c = config;
  Buffers& b = *b_;
  const size_t d = static_cast<size_t>(c.attention_head_dim), half = d / 2, width = static_cast<size_t>(c.q_rows() + 2 * c.kv_rows());
  const int rows = static_cast<int>(b.square0.size()), kv_heads = c.num_key_value_heads, per_kv = c.num_attention_heads / kv_heads;
  b.mixed.resize(b.square0.size() * static_cast<size_t>(c.q_rows()));
  if (c.use_mem_rope) {
    auto rotate = [&](int first, int last, int) {
      for (size_t r = static_cast<size_t>(first); r < static_cast<size_t>(last); ++r)
        for (int head = 0; head < c.num_attention_heads + kv_heads; ++head) {  // q and k lie side by side
          float* x = b.wide.data() + r * width + static_cast<size_t>(head) * d;
          for (size_t i = 0; i < half; ++i) {
            const float one = x[i], two = x[i + half], cosine = b.cosines[r * half + i], sine = b.sines[r * half + i];
            x[i] = one * cosine - two * sine;
            x[i + half] = two * cosine + one * sine;
          }
        }
    };
    if (many) pool_.share(rows, rotate);
    else rotate(0, rows, 0);
  }
  std::vector<const uint8_t*> pages;  // of all segments, one behind the other
  std::vector<size_t> places;
  for (const Segment& s : segments) {
    Cache& cache = s.state->caches[static_cast<size_t>(layer.position)];
    append(cache, s.length, b.wide.data() + static_cast<size_t>(s.start) * width + c.q_rows(), width);
    places.push_back(pages.size());
    for (const auto& page : cache.pages) pages.push_back(page->data);
  }
  // An item is some queries, in the order of their tokens, that see one head of keys and values.
  const int at_once = many ? kMostQueries : kMostRows;
  const int blocks = ((many ? segments[0].length : kMostRows) * per_kv + at_once - 1) / at_once;
  for (int thread = 0; many && thread < pool_.size(); ++thread)  // memory may run out here, but not in a worker, which nothing would catch
    panel(thread, 2 * attend_scratch(c.attention_head_dim));
  pool_.take(static_cast<int>(segments.size()) * blocks * kv_heads, [&](int item, int thread) {
    const int head = item % kv_heads, block = blocks - 1 - item / kv_heads % blocks;  // those with most keys first
    const size_t which = static_cast<size_t>(item / kv_heads / blocks);
    const Segment& s = segments[which];
    const int before = s.state->caches[static_cast<size_t>(layer.position)].length - s.length;
    Query queries[kMostQueries];
    int count = 0;
    for (int i = block * at_once; i < std::min(s.length * per_kv, (block + 1) * at_once); ++i) {
      const size_t row = static_cast<size_t>(s.start + i / per_kv), column = static_cast<size_t>(head * per_kv + i % per_kv) * d;
      queries[count++] = {b.wide.data() + row * width + column, b.mixed.data() + row * static_cast<size_t>(c.q_rows()) + column, before + i / per_kv + 1};
    }
    if (!count) return;
    const KeysValues kv = layout.head(head, pages.data() + places[which]);
    if (!many) kernels.attend(queries, count, kv, c.attention_head_dim, c.attention_scale);
    else kernels.attend_many(queries, count, kv, c.attention_head_dim, c.attention_scale, reinterpret_cast<float*>(panel(thread, 2 * attend_scratch(c.attention_head_dim))));
  });
}

void Engine::mixer(const Layer& layer, const std::vector<Segment>& segments, bool many) {
  const Config& c = config;
  const Mixer& m = layer.mamba;
  Buffers& b = *b_;
  const int rows = static_cast<int>(b.square0.size()), heads = c.n_mamba_heads, P = c.mamba_headdim, N = c.mamba_d_state, taps = c.mamba_d_conv;
  const size_t n = static_cast<size_t>(rows), in = static_cast<size_t>(c.in_proj_dim), inner = static_cast<size_t>(c.d_inner), conv_dim = static_cast<size_t>(c.conv_dim);
  b.wide.resize(n * in);
  b.xbc.resize(n * conv_dim);
  b.dt.resize(n * static_cast<size_t>(heads));
  b.mixed.resize(n * inner);
  multiply(m.in_proj, b.u.data(), static_cast<size_t>(c.hidden_size), rows, many, b.wide.data());
  adapt(m.in_proj, segments, b.u.data(), static_cast<size_t>(c.hidden_size), 0, rows, many, b.wide.data(), in);
  each_row(rows, [&](size_t r) {
    for (size_t h = 0; h < static_cast<size_t>(heads); ++h) {
      const float x = b.wide[r * in + inner + conv_dim + h] + m.dt_bias[h];
      b.dt[r * static_cast<size_t>(heads) + h] = x > 20.0f ? x : std::log1p(std::exp(x));  // softplus, no clamp
    }
  });
  const int slices = (c.conv_dim + 15) / 16, per_group = heads / c.mamba_ngroups;
  for (const Segment& s : segments) {
    float* conv = s.state->conv->data() + static_cast<size_t>(layer.index) * static_cast<size_t>(taps - 1) * conv_dim;
    float* ssm = s.state->ssm->data() + static_cast<size_t>(layer.index) * inner * static_cast<size_t>(N);
    const size_t start = static_cast<size_t>(s.start), length = static_cast<size_t>(s.length), index = static_cast<size_t>(layer.index);
    if (s.record) {  // what the call reads goes into the record, and the state stays as it is
      for (size_t t = 0; t < length; ++t)
        std::memcpy(s.record->inputs.data() + (index * length + t) * conv_dim, b.wide.data() + (start + t) * in + inner, sizeof(float) * conv_dim);
      std::memcpy(s.record->dt.data() + index * length * static_cast<size_t>(heads), b.dt.data() + start * static_cast<size_t>(heads), sizeof(float) * length * static_cast<size_t>(heads));
      b.conv.assign(conv, conv + static_cast<size_t>(taps - 1) * conv_dim);
      conv = b.conv.data();
    }
    pool_.share(slices, [&](int first, int last, int) {
      kernels.convolve(b.wide.data() + start * in + inner, in, s.length, m.conv_weight.data(), m.conv_bias.data(), taps, c.conv_dim, first * 16, std::min(c.conv_dim, last * 16),
                       conv, b.xbc.data() + start * conv_dim);
    });
    if (!many) {
      pool_.balance(heads, kGrain, [&](int first, int last, int thread) {
        // A recorded call steps on a copy of each head's state. chunk_scratch's room is larger than one.
        float* const scratch = s.record ? scratch_[static_cast<size_t>(thread)].data() : nullptr;
        for (int h = first; h < last; ++h) {
          float* S = ssm + static_cast<size_t>(h) * P * N;
          if (s.record) {
            std::memcpy(scratch, S, sizeof(float) * static_cast<size_t>(P) * static_cast<size_t>(N));
            S = scratch;
          }
          for (size_t r = start; r < start + length; ++r)
            step(m, h, b.xbc.data() + r * conv_dim, b.dt[r * static_cast<size_t>(heads) + static_cast<size_t>(h)], S, b.mixed.data() + r * inner + static_cast<size_t>(h) * P);
        }
      });
      continue;
    }
    const int chunks = (s.length + kChunk - 1) / kChunk;
    b.scores.resize(static_cast<size_t>(chunks) * c.mamba_ngroups * kChunk * kChunk);
    pool_.take(chunks * c.mamba_ngroups, [&](int item, int) {
      const int group = item % c.mamba_ngroups, from = item / c.mamba_ngroups * kChunk;
      const float* B = b.xbc.data() + (start + static_cast<size_t>(from)) * conv_dim + inner + static_cast<size_t>(group) * N;
      kernels.chunk_scores(std::min(kChunk, s.length - from), B, B + static_cast<size_t>(c.mamba_ngroups) * N, conv_dim, N, b.scores.data() + static_cast<size_t>(item) * kChunk * kChunk);
    });
    pool_.take(heads, [&](int h, int thread) {
      for (int from = 0; from < s.length; from += kChunk) {
        const size_t r = start + static_cast<size_t>(from);
        const float* xbc = b.xbc.data() + r * conv_dim;
        const float* B = xbc + inner + static_cast<size_t>(h / per_group) * N;
        const size_t item = static_cast<size_t>(from / kChunk * c.mamba_ngroups + h / per_group);
        kernels.chunk(std::min(kChunk, s.length - from), xbc + static_cast<size_t>(h) * P, conv_dim, b.dt.data() + r * static_cast<size_t>(heads) + h, static_cast<size_t>(heads),
                      m.A[static_cast<size_t>(h)], m.D[static_cast<size_t>(h)], b.scores.data() + item * kChunk * kChunk, B, B + static_cast<size_t>(c.mamba_ngroups) * N, conv_dim, P, N,
                      ssm + static_cast<size_t>(h) * P * N, b.mixed.data() + r * inner + static_cast<size_t>(h) * P, inner, scratch_[static_cast<size_t>(thread)].data());
      }
    });
  }
  each_row(rows, [&](size_t r) { kernels.gated_norm(b.mixed.data() + r * inner, b.wide.data() + r * in, m.norm.data(), c.d_inner, c.mamba_ngroups, kMixerEps, b.mixed.data() + r * inner); });
  b.o.resize(n * static_cast<size_t>(c.hidden_size));
  multiply(m.out_proj, b.mixed.data(), inner, rows, many, b.o.data());
  adapt(m.out_proj, segments, b.mixed.data(), inner, 0, rows, many, b.o.data(), static_cast<size_t>(c.hidden_size));
}

}  // namespace zamba2
