// The engine as the Python module zamba2._engine.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>

#include "engine.h"
#include "probe.h"

namespace nb = nanobind;
using namespace zamba2;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Tokens = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix2 = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

Matrix2 owned(std::unique_ptr<float[]> data, size_t rows, size_t cols) {
  float* raw = data.release();
  nb::capsule owner(raw, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return Matrix2(raw, {rows, cols}, owner);
}

const Kernels& kernels_named(const std::string& isa) {
  const Kernels* k = isa.empty() ? &kernels() : find_kernels(isa.c_str());
  if (!k) throw std::invalid_argument("this machine has no instruction set " + isa);
  return *k;
}

void check_threads(int threads) {
  if (threads < 1 || threads > 1024) throw std::invalid_argument("the number of threads must lie between 1 and 1024");
}

Config config_of(const nb::dict& d) {
  auto whole = [&](const char* key) {
    const int64_t value = nb::cast<int64_t>(d[key]);
    if (value < 0 || value > kWidest) throw std::invalid_argument(std::string(key) + " is " + std::to_string(value) + "; at most " + std::to_string(kWidest) + " is possible");
    return static_cast<int>(value);
  };
  Config c;
  const std::pair<const char*, int*> sizes[] = {
      {"hidden_size", &c.hidden_size}, {"num_hidden_layers", &c.num_hidden_layers}, {"vocab_size", &c.vocab_size}, {"num_mem_blocks", &c.num_mem_blocks},
      {"mamba_d_state", &c.mamba_d_state}, {"n_mamba_heads", &c.n_mamba_heads}, {"mamba_headdim", &c.mamba_headdim}, {"mamba_ngroups", &c.mamba_ngroups},
      {"mamba_d_conv", &c.mamba_d_conv}, {"d_inner", &c.d_inner}, {"conv_dim", &c.conv_dim}, {"in_proj_dim", &c.in_proj_dim},
      {"num_attention_heads", &c.num_attention_heads}, {"num_key_value_heads", &c.num_key_value_heads}, {"attention_head_dim", &c.attention_head_dim},
      {"intermediate_size", &c.intermediate_size}, {"adapter_rank", &c.adapter_rank},
  };
  for (const auto& [key, size] : sizes) *size = whole(key);
  c.rms_norm_eps = nb::cast<float>(d["rms_norm_eps"]);
  c.attention_scale = nb::cast<float>(d["attention_scale"]);
  c.rope_base = nb::cast<double>(d["rope_base"]);
  c.use_mem_rope = nb::cast<bool>(d["use_mem_rope"]);
  c.use_shared_attention_adapter = nb::cast<bool>(d["use_shared_attention_adapter"]);
  c.tie_word_embeddings = nb::cast<bool>(d["tie_word_embeddings"]);
  c.hybrid_layer_ids = nb::cast<std::vector<int>>(d["hybrid_layer_ids"]);
  return c;
}

// Calls f(rows in the page, their byte in (heads, length) rows one behind the other, bytes) for all rows of a part.
template <class F>
void visit_rows(const PageLayout& layout, const PageLayout::Part& part, const Cache& cache, F&& f) {
  const size_t length = static_cast<size_t>(cache.length);
  for (size_t h = 0; h < static_cast<size_t>(layout.heads); ++h)
    for (size_t t = 0; t < length; t += kPage)
      f(cache.pages[t / kPage]->data + part.offset + h * kPage * part.row, (h * length + t) * part.row, std::min<size_t>(kPage, length - t) * part.row);
}

// Other threads of Python's go on meanwhile: states are saved beside a running server.
template <class F>
void without_the_interpreter(F&& f) {
  nb::gil_scoped_release release;
  f();
}

// Tensors of a state: conv (layers, taps - 1, conv_dim) and ssm (layers, heads * P, N), fp32; and, as bytes, per position every part of
// PageLayout, (heads, length) rows.
nb::dict export_state(const State& state, const Engine& engine) {
  if (!engine.made(state)) throw std::invalid_argument("the state belongs to another model");
  if (state.broken) throw std::invalid_argument("an earlier call on this state failed midway; there is nothing to save");
  nb::dict d;
  auto floats = [](const Values& v) {
    auto data = std::make_unique<float[]>(v.size());
    without_the_interpreter([&] { std::copy(v.begin(), v.end(), data.get()); });
    return owned(std::move(data), 1, v.size());
  };
  if (state.conv) d["conv"] = floats(*state.conv);
  if (state.ssm) d["ssm"] = floats(*state.ssm);
  nb::list parts;
  for (const Cache& cache : state.caches)
    for (const PageLayout::Part& part : engine.layout.parts) {
      const size_t length = static_cast<size_t>(cache.length), size = static_cast<size_t>(engine.layout.heads) * length * part.row;
      uint8_t* data = new uint8_t[size];
      nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
      without_the_interpreter([&] { visit_rows(engine.layout, part, cache, [&](uint8_t* rows, size_t at, size_t bytes) { std::memcpy(data + at, rows, bytes); }); });
      parts.append(nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(data, {size}, owner));
    }
  d["parts"] = parts;
  return d;
}

// Bytes of a tensor in a saved state's file, and where they go.
struct Piece {
  enum Kind { fp32, bf16, int8 };
  uint8_t* to;
  uint64_t at;
  size_t bytes;
  int tensor;
  Kind kind;
};

// The tensor that could not be read, -1 for none, and why: an errno, 0 where the file ends, -1 for a value that is not finite.
struct Unread {
  int tensor = -1, why = 0;
};

// Whether no value is NaN or infinite.
bool all_finite(const Piece& piece) {
  bool bad = false;
  if (piece.kind == Piece::fp32) {
    const uint32_t* bits = reinterpret_cast<const uint32_t*>(piece.to);
    for (size_t i = 0; i < piece.bytes / 4; ++i) bad |= (bits[i] & 0x7F800000u) == 0x7F800000u;
  } else if (piece.kind == Piece::bf16) {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(piece.to);
    for (size_t i = 0; i < piece.bytes / 2; ++i) bad |= (bits[i] & 0x7F80u) == 0x7F80u;
  }
  return !bad;
}

// On several threads: memory that was never touched comes slower than a disk's bytes.
Unread read_pieces(int file, const std::vector<Piece>& pieces, int threads) {
  std::atomic<size_t> next{0};
  std::mutex alone;
  Unread unread;
  auto work = [&] {
    auto fail = [&](int tensor, int why) {
      const std::lock_guard<std::mutex> hold(alone);
      unread = {tensor, why};
      next = pieces.size();
    };
    for (size_t i = next++; i < pieces.size(); i = next++) {
      const Piece& piece = pieces[i];
      for (size_t done = 0; done < piece.bytes;) {
        const ssize_t got = pread(file, piece.to + done, piece.bytes - done, static_cast<off_t>(piece.at + done));
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return fail(piece.tensor, got < 0 ? errno : 0);
        done += static_cast<size_t>(got);
      }
      if (!all_finite(piece)) return fail(piece.tensor, -1);
    }
  };
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(std::max(threads, 1)));  // no room asked for while others run
  try {
    while (static_cast<int>(others.size()) + 1 < threads) others.emplace_back(work);
  } catch (const std::system_error&) {  // then those that are there do it
  }
  work();
  for (std::thread& other : others) other.join();
  return unread;
}

// The state in a file, or None; with it what could not be read, and why (Unread). offsets: of conv, ssm, and of every part of every
// position, in the order of export_state.
nb::tuple read_state(const Engine& engine, int position, int file, const std::vector<uint64_t>& offsets, int adapter) {
  constexpr size_t kAtOnce = size_t{1} << 20;  // bytes
  const PageLayout& layout = engine.layout;
  State state = engine.new_state(adapter);
  if (position < 1 || position > kMostTokens || offsets.size() != 2 + state.caches.size() * layout.parts.size()) throw std::invalid_argument("the saved state does not fit the model");
  state.position = position;
  state.conv = std::make_shared<Values>(engine.convs);
  state.ssm = std::make_shared<Values>(engine.ssms);
  std::vector<Piece> pieces;
  int tensor = 0;
  for (Values* values : {state.conv.get(), state.ssm.get()}) {
    const size_t whole = values->size() * sizeof(float);
    for (size_t from = 0; from < whole; from += kAtOnce)
      pieces.push_back({reinterpret_cast<uint8_t*>(values->data()) + from, offsets[static_cast<size_t>(tensor)] + from, std::min(kAtOnce, whole - from), tensor, Piece::fp32});
    ++tensor;
  }
  for (Cache& cache : state.caches) {
    cache.length = position;
    for (int t = 0; t < position; t += kPage) {
      cache.pages.push_back(std::make_shared<Page>(engine.pages));
      cache.pages.back()->used = std::min(kPage, position - t);
    }
    for (size_t part = 0; part < layout.parts.size(); ++part, ++tensor) {
      const Piece::Kind kind = part >= 2 ? Piece::fp32 : layout.format == KVFormat::bf16 ? Piece::bf16 : Piece::int8;
      visit_rows(layout, layout.parts[part], cache, [&](uint8_t* rows, size_t at, size_t bytes) { pieces.push_back({rows, offsets[static_cast<size_t>(tensor)] + at, bytes, tensor, kind}); });
    }
  }
  Unread unread;
  without_the_interpreter([&] { unread = read_pieces(file, pieces, std::min(engine.threads(), 4)); });
  return nb::make_tuple(unread.tensor < 0 ? nb::cast(std::move(state)) : nb::none(), unread.tensor, unread.why);
}

std::vector<std::pair<uintptr_t, size_t>> memory_of(const State& state) {
  std::vector<std::pair<uintptr_t, size_t>> found;
  auto add = [&](const void* at, size_t bytes) { found.emplace_back(reinterpret_cast<uintptr_t>(at), bytes); };
  for (const auto& values : {state.conv, state.ssm})
    if (values) add(values->data(), values->size() * sizeof(float));
  for (const Cache& cache : state.caches)
    for (const auto& page : cache.pages) add(page->data, page->blocks->bytes);
  if (state.record) add(state.record.get(), (state.record->inputs.size() + state.record->dt.size()) * sizeof(float));
  return found;
}

Observer observer_of(nb::object f) {
  if (f.is_none()) return nullptr;
  return [f](const std::string& name, const float* data, int rows, int cols) {
    nb::gil_scoped_acquire hold;
    auto copy = std::make_unique<float[]>(static_cast<size_t>(rows) * cols);
    std::copy_n(data, static_cast<size_t>(rows) * cols, copy.get());
    f(name, owned(std::move(copy), static_cast<size_t>(rows), static_cast<size_t>(cols)));
  };
}

}  // namespace

NB_MODULE(_engine, m) {
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const std::domain_error& error) {
      PyErr_SetString(PyExc_ArithmeticError, error.what());
    }
  });
  nb::set_leak_warnings(false);  // an observer that knows its engine is a circle that lives to the end: no news to users
  nb::exception<OutOfMemory>(m, "OutOfMemory", PyExc_MemoryError);
  m.doc() = "Zamba2 on a CPU: packed weights, one state per sequence.";
  m.def("available", [] {
    nb::list names;
    for (const Kernels* k : available_kernels()) names.append(k->name);
    return names;
  }, "Instruction sets that this machine and build have, the best last.");
  m.def("chosen", [] { return std::string(kernels().name); }, "The instruction set in use: the best, or what ZAMBA2_ISA names.");

  m.def("read_bandwidth", [](Bytes data, int threads, const std::string& isa) {
    const Kernels& k = kernels_named(isa);
    check_threads(threads);
    nb::gil_scoped_release release;
    const Reading best = read_bandwidth(k, data.data(), data.size(), threads);
    return std::tuple(best.bytes_per_second, best.pattern, best.sum);
  }, nb::arg("data"), nb::arg("threads"), nb::arg("isa") = "", "Best bytes per second of streaming over memory, how it was read, and the XOR of its words of 8 bytes.");
  m.def("product_rates", [](int threads, const std::string& isa) {
    const Kernels& k = kernels_named(isa);
    check_threads(threads);
    nb::gil_scoped_release release;
    return product_rates(k, threads);
  }, nb::arg("threads"), nb::arg("isa") = "", "Operations per second of each kind of product, in loops that stay in registers.");

  nb::class_<State>(m, "State")
      .def_ro("position", &State::position)
      .def_prop_ro("nbytes", &State::bytes)
      .def_prop_ro("memory", &memory_of, "(address, bytes) of all that it holds; what copies share has the same address.")
      .def("copy", [](const State& s) { return State(s); });

  nb::class_<Engine>(m, "Engine")
      .def("__init__", [](Engine* self, const nb::dict& config, int threads, const std::string& isa, int kv, const std::vector<int>& processors) {
        const Kernels& k = kernels_named(isa);
        check_threads(threads);
        if (kv < 0 || kv > 1) throw std::invalid_argument("there is no such format of keys and values");
        if (!processors.empty() && processors.size() != static_cast<size_t>(threads)) throw std::invalid_argument("one processor for each thread is needed");
        new (self) Engine(config_of(config), threads, k, static_cast<KVFormat>(kv), processors);
      }, nb::arg("config"), nb::arg("threads"), nb::arg("isa") = "", nb::arg("kv") = 0, nb::arg("processors") = std::vector<int>())
      .def("set_matrix", [](Engine& e, const std::string& name, int format, Bytes data) {
        if (format < 0 || format > 2) throw std::invalid_argument("there is no such format");
        e.set_matrix(name, static_cast<Format>(format), data.data(), data.size());
      }, nb::keep_alive<1, 4>())
      .def("set_vector", [](Engine& e, const std::string& name, Floats data) { e.set_vector(name, data.data(), data.size()); })
      .def("add_adapter", &Engine::add_adapter)
      .def("add_part", [](Engine& e, int adapter, const std::string& name, int column, int rank, int outputs, int inputs, Bytes down, Bytes up, float scale) {
        nb::gil_scoped_release release;  // it waits for a running call, whose observer may need Python
        e.add_part(adapter, name, column, rank, outputs, inputs, down.data(), down.size(), up.data(), up.size(), scale);
      }, nb::keep_alive<1, 8>(), nb::keep_alive<1, 9>())
      .def("check_complete", &Engine::check_complete)
      .def_prop_ro("threads", &Engine::threads)
      .def_prop_ro("isa", [](const Engine& e) { return std::string(e.kernels.name); })
      .def("new_state", [](const Engine& e, int adapter) { return e.new_state(adapter); }, nb::arg("adapter") = -1)
      .def("observe", [](Engine& e, nb::object f) { e.observer = observer_of(f); }, nb::arg("function").none(),
           "Calls function(name, float32 (rows, cols)) with every block's output; None ends it.")
      .def("observe_inputs", [](Engine& e, nb::object f) { e.input_observer = observer_of(f); }, nb::arg("function").none(),
           "Calls function(name, float32 (rows, cols)) with the rows that every matrix multiplies, before they are rounded; None ends it.")
      .def("forward", [](Engine& e, const std::vector<State*>& states, const std::vector<Tokens>& tokens, const std::vector<int>& wanted, const std::vector<bool>& record) {
        if (states.size() != tokens.size() || states.size() != wanted.size()) throw std::invalid_argument("states, tokens and wanted must be as many");
        if (!record.empty() && record.size() != states.size()) throw std::invalid_argument("states and record must be as many");
        std::vector<Call> calls;
        size_t rows = 0;
        for (size_t i = 0; i < states.size(); ++i) {
          const int length = static_cast<int>(std::min<size_t>(tokens[i].size(), INT_MAX));  // which forward refuses
          if (!states[i] || length < 1 || wanted[i] < 0 || wanted[i] > length) throw std::invalid_argument("a call needs a state, tokens and 0 to all of their logits");
          for (int t = 0; t < length; ++t)
            if (tokens[i].data()[t] < 0 || tokens[i].data()[t] >= e.config.vocab_size) throw std::invalid_argument("a token id is out of range");
          calls.push_back({states[i], tokens[i].data(), length, wanted[i], !record.empty() && record[i]});
          rows += static_cast<size_t>(wanted[i]);
        }
        std::unique_ptr<float[]> logits(new (std::nothrow) float[rows * static_cast<size_t>(e.config.vocab_size)]);
        if (!logits) throw OutOfMemory(std::to_string(4 * rows * static_cast<size_t>(e.config.vocab_size)) + " bytes of logits are needed");
        {
          nb::gil_scoped_release release;
          e.forward(calls, logits.get());
        }
        return owned(std::move(logits), rows, static_cast<size_t>(e.config.vocab_size));
      }, nb::arg("states"), nb::arg("tokens"), nb::arg("wanted"), nb::arg("record") = std::vector<bool>())
      .def("keep", [](Engine& e, State& s, int n) {
        nb::gil_scoped_release release;
        e.keep(s, n);
      }, "Of a recorded call's tokens only the first n stay read; -1: all.")
      .def("export_state", [](Engine& e, State& s) {
        if (s.record) without_the_interpreter([&] { e.keep(s, -1); });  // without one it is saved while a call on others runs
        return export_state(s, e);
      })
      .def("read_state", &read_state, nb::arg("position"), nb::arg("file"), nb::arg("offsets"), nb::arg("adapter") = -1);
}
