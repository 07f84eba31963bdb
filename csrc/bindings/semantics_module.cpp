// eft_kernels._semantics: csrc/semantics function by function, over NumPy arrays, for tests and for those who write
// kernels of their own. Arguments broadcast, as NumPy's do; what has several results returns a record.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>

#include "../semantics/accept.h"
#include "../semantics/filters.h"
#include "../semantics/mass.h"
#include "../semantics/noise.h"
#include "semantics_lanes.h"

namespace py = pybind11;
using namespace eft;
using namespace eft::scalar;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// --- results of several values -------------------------------------------------------------------------------------

struct SplitResult {
  float f, k;
};
struct Exp2Result {
  float p, n;
};
struct WordsResult {
  uint32_t r0, r1, r2, r3;
};
struct ChunkNoiseResult {
  float e, g;
  uint32_t place;
};

}  // namespace

namespace pybind11::detail {

// a result of numbers alone: one record, where arrays give arrays of them
template <class Record>
struct record_caster {
  static constexpr auto name = const_name("record");
  static handle cast(const Record& x, return_value_policy, handle) {
    return array_t<Record>(1, &x).attr("__getitem__")(0).release();
  }
};
template <>
struct type_caster<SplitResult> : record_caster<SplitResult> {};
template <>
struct type_caster<Exp2Result> : record_caster<Exp2Result> {};
template <>
struct type_caster<WordsResult> : record_caster<WordsResult> {};
template <>
struct type_caster<ChunkNoiseResult> : record_caster<ChunkNoiseResult> {};

}  // namespace pybind11::detail

namespace {

// --- one value at a time -------------------------------------------------------------------------------------------

SplitResult split_of(float x) {
  SplitResult out;
  split(x, out.f, out.k);
  return out;
}

Exp2Result exp2_parts_of(float x) {
  Exp2Result out;
  out.p = exp2_parts(x, out.n);
  return out;
}

WordsResult words_of(int64_t seed, int64_t position, uint32_t stream, uint32_t slot, uint32_t kind, uint32_t index) {
  const Words<uint32_t> w = words(source(seed, position, stream, slot), kind, index);
  return {w.r[0], w.r[1], w.r[2], w.r[3]};
}

ChunkNoiseResult chunk_noise_of(int64_t seed, int64_t position, uint32_t stream, uint32_t slot, uint32_t chunk) {
  const ChunkNoise<float> noise = chunk_noise<float>(source(seed, position, stream, slot), chunk);
  return {noise.e, noise.g, noise.place};
}

double accept_uniform_of(int64_t seed, int64_t position, uint32_t slot) {
  return accept_uniform(source(seed, position, kAccept, slot));
}

double residual_of(double factor, int64_t t, int64_t t_total, int64_t d, int64_t d_total) {
  return Residual(factor, t_total, d_total)(t, d);
}

// --- parameters ----------------------------------------------------------------------------------------------------

// Sampling whose parameters are a number, an array [rows], or off where they are not named; `kept` owns the arrays.
Sampling sampling_of(const py::dict& parameters, py::ssize_t rows, py::list& kept) {
  Sampling s;
  py::size_t known = 0;
#define EFT_TAKE(T, name, off, low, high)                                                    \
  s.name = {nullptr, off};                                                                   \
  if (parameters.contains(#name)) {                                                          \
    Array<T> values(parameters[#name]);                                                      \
    if (values.ndim() == 0) {                                                                \
      s.name.value = *values.data();                                                         \
    } else if (values.ndim() == 1 && values.size() == rows) {                                \
      s.name.data = values.data();                                                           \
      kept.append(values);                                                                   \
    } else {                                                                                 \
      throw py::value_error(#name ": allowed are a number and an array of a value per row"); \
    }                                                                                        \
    ++known;                                                                                 \
  }
  EFT_PARAMETERS(EFT_TAKE)
#undef EFT_TAKE
  if (known != parameters.size()) throw py::value_error("a parameter is unknown");
  return s;
}

// What follows from each row's parameters: a dict of arrays [rows].
py::dict filters(const py::dict& parameters, py::ssize_t rows, int64_t vocab, float best) {
  py::list kept;
  const Sampling sampling = sampling_of(parameters, rows, kept);
#define EFT_OUTPUT(T, name, off, low, high) py::array_t<T> name(rows);
  EFT_PARAMETERS(EFT_OUTPUT)
#undef EFT_OUTPUT
  py::array_t<float> inverse_temperature(rows), c(rows), least(rows);
  py::array_t<bool> greedy(rows), valid(rows), filtered(rows), processed(rows);
  for (py::ssize_t i = 0; i < rows; ++i) {
    const Filters f = filters_of(sampling, i, vocab);
#define EFT_FILL(T, name, off, low, high) name.mutable_at(i) = f.name;
    EFT_PARAMETERS(EFT_FILL)
#undef EFT_FILL
    inverse_temperature.mutable_at(i) = f.inverse_temperature;
    c.mutable_at(i) = f.c;
    least.mutable_at(i) = f.least(best);
    greedy.mutable_at(i) = f.greedy;
    valid.mutable_at(i) = f.valid;
    filtered.mutable_at(i) = f.filtered();
    processed.mutable_at(i) = f.processed();
  }
  py::dict out;
#define EFT_NAME(T, name, off, low, high) out[#name] = name;
  EFT_PARAMETERS(EFT_NAME)
#undef EFT_NAME
  out["inverse_temperature"] = inverse_temperature;
  out["c"] = c;
  out["least"] = least;
  out["greedy"] = greedy;
  out["valid"] = valid;
  out["filtered"] = filtered;
  out["processed"] = processed;
  return out;
}

bool may_filter_of(const py::dict& parameters, py::ssize_t rows, int vocab) {
  py::list kept;
  Call call{};
  static_cast<Sampling&>(call) = sampling_of(parameters, rows, kept);
  call.vocab_size = vocab;
  return may_filter(call);
}

// --- W values at a time --------------------------------------------------------------------------------------------

py::ssize_t length(std::initializer_list<py::array> arrays) {
  const py::ssize_t n = arrays.begin()->size();
  for (const py::array& array : arrays) {
    if (array.ndim() != 1 || array.size() != n) throw py::value_error("allowed are arrays [N], all of one length");
  }
  return n;
}

void bind_lanes(py::module_& m) {
  using L = LaneFunctions;
  using Floats = Array<float>;
  using Words32 = Array<uint32_t>;
  py::class_<L>(m, "Lanes", "The same functions by one instruction set's vectors, over arrays [N].")
      .def_readonly("isa", &L::isa)
      .def_readonly("width", &L::width)
      .def("log",
           [](const L& l, Floats x) {
             const py::ssize_t n = length({x});
             Floats out(n);
             l.log(n, x.data(), out.mutable_data());
             return out;
           })
      .def("exp2_parts",
           [](const L& l, Floats x) {
             const py::ssize_t n = length({x});
             Floats p(n), exponent(n);
             l.exp2_parts(n, x.data(), p.mutable_data(), exponent.mutable_data());
             return py::make_tuple(p, exponent);
           })
      .def("mass_parts",
           [](const L& l, Floats s, Floats best, Floats c) {
             const py::ssize_t n = length({s, best, c});
             Array<int32_t> q(n), shift(n);
             l.mass_parts(n, s.data(), best.data(), c.data(), q.mutable_data(), shift.mutable_data());
             return py::make_tuple(q, shift);
           })
      .def("exponential",
           [](const L& l, Floats u) {
             const py::ssize_t n = length({u});
             Floats out(n);
             l.exponential(n, u.data(), out.mutable_data());
             return out;
           })
      .def("uniform",
           [](const L& l, Words32 r) {
             const py::ssize_t n = length({r});
             Floats out(n);
             l.uniform(n, r.data(), out.mutable_data());
             return out;
           })
      .def(
          "words",
          [](const L& l, int64_t seed, int64_t position, uint32_t stream, uint32_t slot, uint32_t kind, Words32 index) {
            const py::ssize_t n = length({index});
            py::array_t<uint32_t> out({py::ssize_t{4}, n});
            l.words(n, {seed, position, stream, slot}, kind, index.data(), out.mutable_data());
            return out;
          })
      .def("chunk_noise",
           [](const L& l, int64_t seed, int64_t position, uint32_t stream, uint32_t slot, Words32 chunk) {
             const py::ssize_t n = length({chunk});
             Floats e(n), g(n);
             Words32 place(n);
             l.chunk_noise(n, {seed, position, stream, slot}, chunk.data(), e.mutable_data(), g.mutable_data(),
                           place.mutable_data());
             return py::make_tuple(e, g, place);
           })
      .def("token_gumbel", [](const L& l, Floats e, Floats g, Words32 word) {
        const py::ssize_t n = length({e, g, word});
        Floats out(n);
        l.token_gumbel(n, e.data(), g.data(), word.data(), out.mutable_data());
        return out;
      });
  py::dict lanes;
  auto add = [&](const L& functions) {
    lanes[functions.isa] = py::cast(functions, py::return_value_policy::reference);
  };
  add(lanes_baseline());
#if defined(__x86_64__) && defined(EFT_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) add(lanes_avx2());
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    add(lanes_avx512());
  }
#endif
  m.attr("lanes") = lanes;
}

}  // namespace

PYBIND11_MODULE(_semantics, m) {
  PYBIND11_NUMPY_DTYPE(SplitResult, f, k);
  PYBIND11_NUMPY_DTYPE(Exp2Result, p, n);
  PYBIND11_NUMPY_DTYPE(WordsResult, r0, r1, r2, r3);
  PYBIND11_NUMPY_DTYPE(ChunkNoiseResult, e, g, place);
  using namespace py::literals;

  m.def("log_poly", py::vectorize(&log_poly<float>), "f"_a, "k"_a);
  m.def("split", py::vectorize(&split_of), "x"_a, "x = (1 + f) 2^k");
  m.def("log", py::vectorize(&scalar::log<float>), "x"_a, "of positive normal float32");
  m.def("exp2_parts", py::vectorize(&exp2_parts_of), "x"_a, "2^x = p 2^n, x <= 0");

  m.def("row_seed", py::vectorize(&row_seed), "seed"_a, "row"_a);
  m.def("words", py::vectorize(&words_of), "seed"_a, "position"_a, "stream"_a, "slot"_a, "kind"_a, "index"_a);
  m.def("uniform", py::vectorize(&uniform<float>), "word"_a);
  m.def("exponential", py::vectorize(&exponential<float>), "u"_a);
  m.def("chunk_noise", py::vectorize(&chunk_noise_of), "seed"_a, "position"_a, "stream"_a, "slot"_a, "chunk"_a);
  m.def("token_gumbel", py::vectorize(&token_gumbel<float>), "chunk_e"_a, "chunk_g"_a, "word"_a);
  m.def("accept_uniform", py::vectorize(&accept_uniform_of), "seed"_a, "position"_a, "slot"_a);

  m.def("mass", py::vectorize(&mass), "s"_a, "best"_a, "c"_a);
  m.def("mass_of", py::vectorize(&mass_of), "significand"_a, "shift"_a);
  m.def("surprise", py::vectorize(&surprise), "s"_a, "best"_a, "c"_a);
  m.def("log_total", py::vectorize(&log_total), "total"_a);
  m.def("mass_limit", py::vectorize(static_cast<int64_t (*)(float, int64_t)>(&mass_limit)), "p"_a, "total"_a);

  m.def("mean_score", py::vectorize(&mean_score), "best"_a, "c"_a, "surprises"_a, "total"_a);
  m.def("edge", py::vectorize(&edge), "center"_a, "reach"_a);

  m.def("accept_token", py::vectorize(&accept_token), "u"_a, "t"_a, "t_total"_a, "d"_a, "d_total"_a);
  m.def("residual", py::vectorize(&residual_of), "factor"_a, "t"_a, "t_total"_a, "d"_a, "d_total"_a);
  m.def("block_ratio", py::vectorize(&block_ratio), "ratio"_a, "t"_a, "t_total"_a, "d"_a, "d_total"_a);
  m.def("block_passes", py::vectorize(&block_passes), "u"_a, "ratio"_a, "residual_sum"_a, "last"_a);

  m.def("filters", &filters, "parameters"_a, "rows"_a, "vocab"_a, "best"_a = 0.0f,
        "what follows from each row's parameters; best: the row's largest score");
  m.def("may_filter", &may_filter_of, "parameters"_a, "rows"_a, "vocab"_a);
  bind_lanes(m);
}
