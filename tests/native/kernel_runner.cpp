// Calls the kernels of one table on arrays from a file: what tests/test_kernels.py and tests/test_arm64.py drive.
//   kernel_runner                      prints the tables that this machine can run, one a line, with 1 if they have matrix units
//                                      and 1 if they multiply pairs of bf16
//   kernel_runner TABLE CASES RESULTS  makes the calls of CASES; RESULTS gets the bytes of all their arrays as they are afterwards
// A file of cases: per case a name, the number of its arguments and those, in the order of the function's own; a result comes
// last. Per argument: name, type (as NumPy writes it), bytes. Numbers and lengths are 64 bits wide.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <new>
#include <tuple>
#include <type_traits>

#include "engine.h"

namespace zamba2 {
extern const Kernels* const kAvxVnniStandIn;
extern const Kernels* const kAvx512StandIn;
extern const Kernels* const kAvx512Bf16StandIn;
extern const Kernels* const kAmxStandIn;
}

using namespace zamba2;

namespace {

// ---- memory that shows what reaches past its end --------------------------------------------------------------------------

constexpr uint8_t kUntouched = 0xa5;

size_t page() {
  static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

// Bytes that end where a page begins that may not be touched. A page of known bytes lies before them: its first eight are the
// size of it all.
void* guarded(size_t bytes) {
  const size_t before = page() + (page() - bytes % page()) % page(), whole = before + bytes + page();
  void* start = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED || mprotect(static_cast<uint8_t*>(start) + before + bytes, page(), PROT_NONE) != 0) std::abort();
  std::memset(start, kUntouched, before);
  std::memcpy(start, &whole, sizeof whole);
  return static_cast<uint8_t*>(start) + before;
}

void release(void* p) noexcept {
  if (!p) return;
  uint8_t* start = reinterpret_cast<uint8_t*>(reinterpret_cast<uintptr_t>(p) / page() * page() - page());
  for (const uint8_t* q = start + sizeof(size_t); q < p; ++q)
    if (*q != kUntouched) {
      std::fputs("bytes before the start of an array were written\n", stderr);
      std::abort();
    }
  size_t whole;
  std::memcpy(&whole, start, sizeof whole);
  munmap(start, whole);
}

}  // namespace

#if !defined(__SANITIZE_ADDRESS__)  // vectors too, to 16 bytes; the sanitizer has its own guards
void* operator new(size_t bytes) { return guarded((bytes + 15) / 16 * 16); }
void operator delete(void* p) noexcept { release(p); }
void operator delete(void* p, size_t) noexcept { release(p); }
#endif

namespace {

// ---- cases ------------------------------------------------------------------------------------------------------------------

char current[200];  // said by the handler of bad accesses

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "%s: %s\n", current, message.c_str());
  std::exit(2);
}

struct Argument {
  std::string name, type;
  std::unique_ptr<uint8_t, void (*)(void*)> data{nullptr, [](void* p) { release(p); }};
  size_t bytes = 0;
};

template <class T>
const char* type_name() {
  using V = std::remove_const_t<T>;
  if constexpr (std::is_same_v<V, float>) return "f4";
  else if constexpr (std::is_same_v<V, int8_t>) return "i1";
  else if constexpr (std::is_same_v<V, uint8_t>) return "u1";
  else if constexpr (std::is_same_v<V, uint16_t>) return "u2";
  else if constexpr (std::is_same_v<V, int32_t>) return "i4";
  else if constexpr (std::is_same_v<V, int64_t>) return "i8";
}

struct Case {
  std::string function;
  std::vector<Argument> arguments;
  size_t next = 0;
  const Kernels* kernels = nullptr;
  Format weights{};  // of the matrix among the arguments
  std::vector<Query> queries;          // what pointers of the next two lead to
  std::vector<const uint8_t*> pages;

  Argument& take(const char* type) {
    if (next == arguments.size()) fail("more arguments are needed than the case has");
    Argument& a = arguments[next++];
    if (a.type != type) fail("argument " + a.name + " is " + a.type + "; " + type + " is needed");
    return a;
  }
};

// The next argument, or arguments, of a case as a parameter of type T.
template <class T>
T take(Case& c) {
  if constexpr (std::is_pointer_v<T>) return reinterpret_cast<T>(c.take(type_name<std::remove_pointer_t<T>>()).data.get());
  else if constexpr (std::is_integral_v<T> || std::is_enum_v<T>) return static_cast<T>(*take<int64_t*>(c));
  else return *take<T*>(c);
}

template <class T>
void take_vector(Case& c, std::vector<T>& v) {
  Argument& a = c.take(type_name<T>());
  const T* data = reinterpret_cast<const T*>(a.data.get());
  v.assign(data, data + a.bytes / sizeof(T));
}

template <>
Matrix take<Matrix>(Case& c) {
  Matrix w{take<const uint8_t*>(c), take<int>(c), take<int>(c), take<Format>(c)};
  if (c.arguments[c.next - 4].bytes != w.bytes()) fail("the matrix has another size than its shape and format need");
  c.weights = w.format;
  return w;
}

// rows, cols, values and halves; the codes are made by the table itself, as the engine does it.
template <>
Activations take<Activations>(Case& c) {
  Activations x;
  x.rows = take<int>(c);
  x.cols = take<int>(c);
  take_vector(c, x.values);
  take_vector(c, x.halves);
  const size_t rows = static_cast<size_t>(x.rows), line = static_cast<size_t>(x.stride()), groups = static_cast<size_t>(x.groups());
  x.codes.resize(rows * line);
  x.scales.resize(rows * groups);
  x.starts.resize(rows * groups);
  for (int r = 0; r < x.rows; ++r) {
    const int tile = r / kMostRows * kMostRows;
    const size_t at = static_cast<size_t>(tile);
    c.kernels->quantize(x.values.data() + static_cast<size_t>(r) * line, x.cols, c.weights, r - tile, std::min(kMostRows, x.rows - tile),
                        x.codes.data() + at * line, x.scales.data() + at * groups, x.starts.data() + at * groups);
  }
  return x;
}

// Three arguments: queries (count, d), room for their outputs, and lengths (count).
template <>
const Query* take<const Query*>(Case& c) {
  const Argument& q = c.take("f4");
  float* y = take<float*>(c);
  const Argument& lengths = c.take("i8");
  const size_t count = lengths.bytes / sizeof(int64_t), d = q.bytes / sizeof(float) / count;
  for (size_t i = 0; i < count; ++i)
    c.queries.push_back({reinterpret_cast<const float*>(q.data.get()) + i * d, y + i * d, static_cast<int>(reinterpret_cast<const int64_t*>(lengths.data.get())[i])});
  return c.queries.data();
}

// Seven arguments: the pages' bytes one behind the other, which of them comes when, then the members of the struct but for `pages`.
template <>
KeysValues take<KeysValues>(Case& c) {
  const Argument& pages = c.take("u1");
  const Argument& order = c.take("i8");
  const size_t count = order.bytes / sizeof(int64_t), size = pages.bytes / count;
  for (size_t i = 0; i < count; ++i) c.pages.push_back(pages.data.get() + static_cast<size_t>(reinterpret_cast<const int64_t*>(order.data.get())[i]) * size);
  const KVFormat format = take<KVFormat>(c);
  const size_t keys = take<size_t>(c), values = take<size_t>(c), key_scales = take<size_t>(c), value_scales = take<size_t>(c);
  return {format, c.pages.data(), keys, values, key_scales, value_scales};
}

template <class R, class... A>
void call(R (*f)(A...), Case& c) {
  std::tuple<std::decay_t<A>...> arguments{take<std::decay_t<A>>(c)...};  // in this order: within braces
  if constexpr (std::is_void_v<R>) {
    if (c.next != c.arguments.size()) fail("the case has more arguments than are needed");
    std::apply(f, arguments);
  } else {
    auto* result = take<std::conditional_t<std::is_same_v<R, bool>, uint8_t, R>*>(c);
    *result = std::apply(f, arguments);
  }
}

// A whole model: config, threads, then tensors by name, last tokens, the lengths of the calls and all their logits.
constexpr std::pair<const char*, int Config::*> kWhole[] = {
    {"hidden_size", &Config::hidden_size},
    {"num_hidden_layers", &Config::num_hidden_layers},
    {"vocab_size", &Config::vocab_size},
    {"num_mem_blocks", &Config::num_mem_blocks},
    {"mamba_d_state", &Config::mamba_d_state},
    {"n_mamba_heads", &Config::n_mamba_heads},
    {"mamba_headdim", &Config::mamba_headdim},
    {"mamba_ngroups", &Config::mamba_ngroups},
    {"mamba_d_conv", &Config::mamba_d_conv},
    {"d_inner", &Config::d_inner},
    {"conv_dim", &Config::conv_dim},
    {"in_proj_dim", &Config::in_proj_dim},
    {"num_attention_heads", &Config::num_attention_heads},
    {"num_key_value_heads", &Config::num_key_value_heads},
    {"attention_head_dim", &Config::attention_head_dim},
    {"intermediate_size", &Config::intermediate_size},
    {"adapter_rank", &Config::adapter_rank},
};

void engine(const Kernels& kernels, Case& c) {
  std::map<std::string, Argument*> by_name;
  for (Argument& a : c.arguments) by_name[a.name] = &a;
  auto whole = [&](const std::string& name) {
    if (!by_name.contains(name)) fail("there is no " + name);
    return static_cast<int>(*reinterpret_cast<const int64_t*>(by_name[name]->data.get()));
  };
  auto real = [&](const std::string& name) { return *reinterpret_cast<const float*>(by_name.at(name)->data.get()); };
  Config config{};
  for (const auto& [name, member] : kWhole) config.*member = whole(name);
  config.rms_norm_eps = real("rms_norm_eps");
  config.attention_scale = real("attention_scale");
  config.rope_base = real("rope_base");
  config.use_mem_rope = whole("use_mem_rope");
  config.use_shared_attention_adapter = whole("use_shared_attention_adapter");
  config.tie_word_embeddings = whole("tie_word_embeddings");
  const Argument& hybrid = *by_name.at("hybrid_layer_ids");
  const int64_t* ids = reinterpret_cast<const int64_t*>(hybrid.data.get());
  config.hybrid_layer_ids.assign(ids, ids + hybrid.bytes / sizeof(int64_t));
  Engine engine(config, whole("threads"), kernels, static_cast<KVFormat>(whole("kv")));
  for (const Argument& a : c.arguments) {
    const bool table = a.name == "embed_tokens.weight" || a.name == "lm_head.weight";
    if (a.type == "u1") engine.set_matrix(a.name, static_cast<Format>(whole(table ? "embeddings" : "format")), a.data.get(), a.bytes);
    else if (a.type == "f4" && a.name.find('.') != std::string::npos) engine.set_vector(a.name, reinterpret_cast<const float*>(a.data.get()), a.bytes / 4);
  }
  engine.check_complete();
  State state = engine.new_state();
  const int32_t* tokens = reinterpret_cast<const int32_t*>(by_name.at("tokens")->data.get());
  float* logits = reinterpret_cast<float*>(by_name.at("logits")->data.get());
  const Argument& lengths = *by_name.at("lengths");
  for (size_t i = 0; i < lengths.bytes / sizeof(int64_t); ++i) {
    const int length = static_cast<int>(reinterpret_cast<const int64_t*>(lengths.data.get())[i]);
    engine.forward({{&state, tokens, length, length}}, logits);
    tokens += length;
    logits += static_cast<size_t>(length) * static_cast<size_t>(config.vocab_size);
  }
}

using Function = void (*)(const Kernels&, Case&);
#define ZAMBA2_KERNEL(name) {#name, [](const Kernels& k, Case& c) { call(k.name, c); }}
const std::pair<const char*, Function> kFunctions[] = {
    ZAMBA2_KERNEL(quantize), ZAMBA2_KERNEL(multiply), ZAMBA2_KERNEL(multiply_many), ZAMBA2_KERNEL(to_bf16), ZAMBA2_KERNEL(to_tiles),
    ZAMBA2_KERNEL(from_bf16), ZAMBA2_KERNEL(finite), ZAMBA2_KERNEL(sum_of_squares), ZAMBA2_KERNEL(scale_by), ZAMBA2_KERNEL(add_scaled),
    ZAMBA2_KERNEL(gated_norm), ZAMBA2_KERNEL(geglu), ZAMBA2_KERNEL(convolve), ZAMBA2_KERNEL(step), ZAMBA2_KERNEL(chunk),
    ZAMBA2_KERNEL(chunk_scores), ZAMBA2_KERNEL(to_q8), ZAMBA2_KERNEL(attend), ZAMBA2_KERNEL(attend_many), {"engine", engine},
};

std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> found = available_kernels();
#if defined(__x86_64__)
  if (find_kernels("avx2")) found.insert(found.end(), {kAvxVnniStandIn, kAvx512StandIn, kAvx512Bf16StandIn, kAmxStandIn});
#endif
  return found;
}

// ---- files ------------------------------------------------------------------------------------------------------------------

size_t read_count(std::istream& in) {
  uint64_t n = 0;
  in.read(reinterpret_cast<char*>(&n), sizeof n);
  return n;
}

std::string read_text(std::istream& in) {
  std::string text(read_count(in), ' ');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  return text;
}

Case read_case(std::istream& in) {
  Case c;
  c.function = read_text(in);
  c.arguments.resize(read_count(in));
  for (Argument& a : c.arguments) {
    a.name = read_text(in);
    a.type = read_text(in);
    a.bytes = read_count(in);
    a.data.reset(static_cast<uint8_t*>(guarded(a.bytes)));
    in.read(reinterpret_cast<char*>(a.data.get()), static_cast<std::streamsize>(a.bytes));
  }
  if (!in) fail("the file of cases ends early");
  return c;
}

void run(const Kernels& kernels, const char* cases, const char* results) {
  std::ifstream in(cases, std::ios::binary);
  std::ofstream out(results, std::ios::binary);
  for (int number = 0; in.peek() != EOF; ++number) {
    Case c = read_case(in);
    std::snprintf(current, sizeof current, "%s, case %d of %s", kernels.name, number, c.function.c_str());
    Function function = nullptr;
    for (const auto& [name, f] : kFunctions)
      if (c.function == name) function = f;
    if (!function) fail("there is no such function");
    c.kernels = &kernels;
    function(kernels, c);
    for (const Argument& a : c.arguments) out.write(reinterpret_cast<const char*>(a.data.get()), static_cast<std::streamsize>(a.bytes));
  }
  if (!out.flush()) fail("the results cannot be written");
}

void on_bad_access(int signal) {
  const char* message = signal == SIGABRT ? " was stopped\n" : " touches memory past the end of an array\n";
  if (write(2, current, std::strlen(current)) < 0 || write(2, message, std::strlen(message)) < 0) _exit(4);
  _exit(3);
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 1) {
    for (const Kernels* k : tables()) std::printf("%s %d %d\n", k->name, k->matrix_units ? 1 : 0, k->bf16_products ? 1 : 0);
    return 0;
  }
  if (count != 4) {
    std::fputs("usage: kernel_runner [TABLE CASES RESULTS]\n", stderr);
    return 2;
  }
#if !defined(__SANITIZE_ADDRESS__)
  for (int signal : {SIGSEGV, SIGBUS, SIGABRT}) std::signal(signal, on_bad_access);
#endif
  for (const Kernels* k : tables())
    if (std::string(k->name) == arguments[1]) {
      run(*k, arguments[2], arguments[3]);
      return 0;
    }
  std::fprintf(stderr, "this machine has no table %s\n", arguments[1]);
  return 2;
}
