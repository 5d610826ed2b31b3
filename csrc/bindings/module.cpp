// What Python calls of the native part: integers and dicts in, exceptions out, the GIL released
// while the loops run. This folder alone knows Python.
//
// Arrays come as addresses. SAFETY: the caller (magic_fast/ops/native/backend.py) keeps every array
// alive until the call returns, and has checked shapes, dtypes, contiguity and overlap.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "jobs.h"
#include "magic_fast.h"
#include "results.h"

namespace {

// The call, without the GIL.
template <class F>
void run(F&& call) {
  mf_status status;
  std::string message;
  {
    py::gil_scoped_release release;
    status = call();
  }
  check(status);
}

py::list select_jobs(const py::list& jobs, int threads, int isa) {
  Batch batch(jobs);
  const mf_options options{threads, isa};
  run([&] { return mf_cpu_select(batch.jobs.data(), (int64_t)batch.jobs.size(), &options); });
  py::list out;
  for (const mf_job& job : batch.jobs) out.append(selection_of(job));
  return out;
}

py::list merge_jobs(const py::list& jobs, int threads, int isa) {
  Batch batch(jobs);
  const mf_options options{threads, isa};
  run([&] { return mf_cpu_merge(batch.jobs.data(), (int64_t)batch.jobs.size(), &options); });
  py::list out;
  for (const mf_job& job : batch.jobs) out.append(stats_of(job));
  return out;
}

Batch one(const py::dict& job) {
  py::list list;
  list.append(job);
  return Batch(list);
}

void row_stats(const py::dict& job, uintptr_t gram, uintptr_t dots, uintptr_t norm2, int threads,
               int isa) {
  Batch batch = one(job);
  const mf_options options{threads, isa};
  run([&] {
    return mf_cpu_row_stats(batch.jobs.data(), reinterpret_cast<double*>(gram),
                            reinterpret_cast<double*>(dots), reinterpret_cast<double*>(norm2),
                            &options);
  });
}

void gram(const py::dict& job, int64_t cols, bool wide, uintptr_t out, int threads, int isa) {
  Batch batch = one(job);
  const mf_options options{threads, isa};
  run([&] {
    return mf_cpu_gram(batch.jobs.data(), cols, wide, reinterpret_cast<double*>(out), &options);
  });
}

void scale(const py::dict& job, uintptr_t coefficient, int threads, int isa) {
  Batch batch = one(job);
  const mf_options options{threads, isa};
  run([&] {
    return mf_cpu_scale(batch.jobs.data(), reinterpret_cast<const float*>(coefficient), &options);
  });
}

void row_norms(const py::dict& job, uintptr_t l1, uintptr_t l2, uintptr_t linf, int threads,
               int isa) {
  Batch batch = one(job);
  const mf_options options{threads, isa};
  run([&] {
    return mf_cpu_row_norms(batch.jobs.data(), reinterpret_cast<double*>(l1),
                            reinterpret_cast<double*>(l2), reinterpret_cast<double*>(linf),
                            &options);
  });
}

void norm_sums(const py::dict& job, uintptr_t before, uintptr_t after, uintptr_t squares,
               int threads, int isa) {
  Batch batch = one(job);
  const mf_options options{threads, isa};
  run([&] {
    return mf_cpu_norm_sums(batch.jobs.data(), reinterpret_cast<double*>(before),
                            reinterpret_cast<double*>(after), reinterpret_cast<double*>(squares),
                            &options);
  });
}

void energies(const py::dict& job, uintptr_t squares, int threads, int isa) {
  Batch batch = one(job);
  const mf_options options{threads, isa};
  run([&] {
    return mf_cpu_energies(batch.jobs.data(), reinterpret_cast<double*>(squares), &options);
  });
}

void holders(const py::dict& job, uintptr_t alone, uintptr_t shared, int threads, int isa) {
  Batch batch = one(job);
  const mf_options options{threads, isa};
  run([&] {
    return mf_cpu_holders(batch.jobs.data(), reinterpret_cast<int64_t*>(alone),
                          reinterpret_cast<int64_t*>(shared), &options);
  });
}

void score_counts(const py::dict& job, const std::vector<uint32_t>& prefix, uintptr_t counts,
                  uintptr_t top, int threads, int isa) {
  Batch batch = one(job);
  const mf_options options{threads, isa};
  run([&] {
    return mf_cpu_score_counts(batch.jobs.data(), prefix.empty() ? nullptr : prefix.data(),
                               reinterpret_cast<int64_t*>(counts), reinterpret_cast<uint32_t*>(top),
                               &options);
  });
}

py::tuple select_variance(const py::dict& job, double fraction, int threads, int isa) {
  Batch batch = one(job);
  const mf_options options{threads, isa};
  float threshold = 0;
  int64_t tie_cut = 0;
  run([&] {
    return mf_cpu_select_variance(batch.jobs.data(), fraction, &threshold, &tie_cut, &options);
  });
  return py::make_tuple(threshold, tie_cut);
}

int64_t vote_sum(const py::dict& job, int threads, int isa) {
  Batch batch = one(job);
  const mf_options options{threads, isa};
  int64_t sum = 0;
  run([&] { return mf_cpu_vote_sum(batch.jobs.data(), &sum, &options); });
  return sum;
}

void random_words(uint64_t flat, int64_t n, uint64_t stream, uint64_t seed, uintptr_t words,
                  int isa) {
  const mf_options options{1, isa};
  check(mf_cpu_random_words(flat, n, stream, seed, reinterpret_cast<uint32_t*>(words), &options));
}

// Selection over data that comes in pieces.
class Search {
 public:
  explicit Search(const py::dict& prototype) : prototype_(one(prototype)) {
    check(mf_search_begin(prototype_.jobs.data(), &search_));
  }
  ~Search() { mf_search_end(search_); }
  Search(const Search&) = delete;
  Search& operator=(const Search&) = delete;

  void sample(const py::dict& piece) {
    Batch batch = one(piece);
    run([&] { return mf_search_sample(search_, batch.jobs.data()); });
  }
  void feed(const py::dict& piece, int threads, int isa) {
    Batch batch = one(piece);
    const mf_options options{threads, isa};
    run([&] { return mf_search_feed(search_, batch.jobs.data(), &options); });
  }
  py::list wants() {
    const int64_t* ranges = nullptr;
    int64_t count = 0;
    check(mf_search_wants(search_, &ranges, &count));
    py::list out;
    for (int64_t i = 0; i < count; ++i)
      out.append(py::make_tuple(ranges[2 * i], ranges[2 * i + 1]));
    return out;
  }
  py::tuple result() {
    mf_job& job = prototype_.jobs[0];
    check(mf_search_result(search_, job.experts));
    return selection_of(job);
  }

 private:
  Batch prototype_;
  mf_search* search_ = nullptr;
};

int isa_number(const std::string& name) {
  for (int isa = 0; isa < MF_ISA_COUNT; ++isa)
    if (name == mf_isa_name(isa)) return isa;
  throw py::value_error("instruction set: expected 'baseline', 'avx2', 'avx512' or 'neon', got '" +
                        name + "'.");
}

py::dict build_config() {
  py::dict d;
  py::list compiled, supported;
  for (int isa = 0; isa < MF_ISA_COUNT; ++isa) {
    if (mf_isa_compiled(isa)) compiled.append(mf_isa_name(isa));
    if (mf_isa_supported(isa)) supported.append(mf_isa_name(isa));
  }
  d["compiler"] =
#if defined(__clang__)
      "clang " __clang_version__;
#else
      "gcc " __VERSION__;
#endif
  d["isas"] = compiled;
  d["supported_isas"] = supported;
#if defined(MF_SANITIZED)
  d["sanitized"] = true;
#else
  d["sanitized"] = false;
#endif
  return d;
}

std::string isa() {
  int32_t chosen = 0;
  check(mf_isa_chosen(nullptr, &chosen));
  return mf_isa_name(chosen);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Fused merge and calibration on the CPU. Use it through magic_fast.ops.native.backend.";
  py::class_<Plan>(m, "Plan").def(py::init<py::dict, py::sequence>());
  py::class_<Calibration>(m, "Calibration")
      .def(py::init<int64_t, int64_t, int, bool, double, int, bool, py::object, double, double, int,
                    py::sequence>(),
           py::kw_only(), py::arg("rows"), py::arg("cols"), py::arg("variant"),
           py::arg("per_tensor"), py::arg("p"), py::arg("eps_mode"), py::arg("guards"),
           py::arg("clamp"), py::arg("strength"), py::arg("scale"), py::arg("direction"),
           py::arg("included"));
  py::class_<Search>(m, "Search")
      .def(py::init<const py::dict&>())
      .def("sample", &Search::sample)
      .def("feed", &Search::feed, py::arg("piece"), py::arg("threads") = 0, py::arg("isa") = -1)
      .def("wants", &Search::wants)
      .def("result", &Search::result);
  m.def("select", &select_jobs, py::arg("jobs"), py::arg("threads") = 0, py::arg("isa") = -1);
  m.def("merge", &merge_jobs, py::arg("jobs"), py::arg("threads") = 0, py::arg("isa") = -1);
  m.def("row_stats", &row_stats, py::arg("job"), py::arg("gram"), py::arg("dots"), py::arg("norm2"),
        py::arg("threads") = 0, py::arg("isa") = -1);
  m.def("gram", &gram, py::arg("job"), py::arg("cols"), py::arg("wide"), py::arg("gram"),
        py::arg("threads") = 0, py::arg("isa") = -1);
  m.def("scale", &scale, py::arg("job"), py::arg("coefficient"), py::arg("threads") = 0,
        py::arg("isa") = -1);
  m.def("row_norms", &row_norms, py::arg("job"), py::arg("l1"), py::arg("l2"), py::arg("linf"),
        py::arg("threads") = 0, py::arg("isa") = -1);
  m.def("norm_sums", &norm_sums, py::arg("job"), py::arg("before"), py::arg("after"),
        py::arg("squares"), py::arg("threads") = 0, py::arg("isa") = -1);
  m.def("energies", &energies, py::arg("job"), py::arg("squares"), py::arg("threads") = 0,
        py::arg("isa") = -1);
  m.def("holders", &holders, py::arg("job"), py::arg("alone"), py::arg("shared"),
        py::arg("threads") = 0, py::arg("isa") = -1);
  m.def("score_counts", &score_counts, py::arg("job"), py::arg("prefix"), py::arg("counts"),
        py::arg("top"), py::arg("threads") = 0, py::arg("isa") = -1);
  m.def("select_variance", &select_variance, py::arg("job"), py::arg("fraction"),
        py::arg("threads") = 0, py::arg("isa") = -1);
  m.def("vote_sum", &vote_sum, py::arg("job"), py::arg("threads") = 0, py::arg("isa") = -1);
  m.def("random_words", &random_words, py::arg("flat"), py::arg("n"), py::arg("stream"),
        py::arg("seed"), py::arg("words"), py::arg("isa") = -1);
  m.def("isa", &isa, "The instruction set that runs, after MAGIC_FAST_CPU_ISA.");
  m.def("isa_number", &isa_number);
  m.def("num_threads", [] { return mf_num_threads(nullptr); });
  m.def("build_config", &build_config);
}
