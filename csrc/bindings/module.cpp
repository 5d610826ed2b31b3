// The only file that knows Python: integers and tuples in, exceptions out, the GIL released while
// the loops run.
//
// Arrays come as addresses. SAFETY: the caller (magic_fast/ops/native.py) keeps every array alive
// until the call returns, and has checked shapes, dtypes, contiguity and overlap.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "magic_fast.h"

namespace py = pybind11;

namespace {

[[noreturn]] void fail(mf_status status) {
  const std::string message = mf_last_error();
  if (status == MF_NO_MEMORY) throw py::value_error("out of memory in the native backend.");
  if (status == MF_UNSUPPORTED || status == MF_INVALID) throw py::value_error(message);
  throw std::runtime_error(message);
}
void check(mf_status status) {
  if (status != MF_OK) fail(status);
}

template <class T>
T address(const py::handle& x) {
  return reinterpret_cast<T>(static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(x.ptr())));
}
int64_t integer(const py::handle& x) { return PyLong_AsLongLong(x.ptr()); }

// A recipe for tensors of one size, ready to be copied into jobs.
struct Plan {
  std::vector<mf_expert> experts;
  std::vector<float> given_factor;  // factor of an expert whose keep mask is fed in
  mf_job job{};

  Plan(py::dict recipe, py::sequence per_expert) {
    const auto get = [&](const char* name) { return (int32_t)integer(recipe[name]); };
    job.num_experts = (int32_t)per_expert.size();
    job.scale = recipe["scale"].cast<float>();
    job.seed = PyLong_AsUnsignedLongLongMask(py::object(recipe["seed"]).ptr());
    job.tie_rule = get("tie_rule"), job.rescale = get("rescale"), job.vote = get("vote");
    job.vote_on = get("vote_on"), job.zero_vote = get("zero_vote");
    job.contributors = get("contributors"), job.reduce = get("reduce");
    job.consensus = get("consensus"), job.min_tasks = get("min_tasks");
    job.least = recipe["least"].cast<float>(), job.limit = recipe["limit"].cast<float>();
    job.alone = get("alone"), job.limited = get("limited"), job.competes = get("competes");
    for (py::handle item : per_expert) {
      const auto d = py::reinterpret_borrow<py::dict>(item);
      mf_expert e{};
      e.weight = d["weight"].cast<float>();
      e.trim = (int32_t)integer(d["trim"]);
      e.count = integer(d["count"]), e.top_count = integer(d["top_count"]);
      e.density = d["density"].cast<double>(), e.epsilon = d["epsilon"].cast<double>();
      e.random_bound = (uint32_t)integer(d["random_bound"]);
      e.lambda = d["lambda"].cast<float>();
      e.factor = d["factor"].cast<float>(), e.threshold = d["threshold"].cast<float>();
      e.alone = 1;
      e.included = 1;
      experts.push_back(e);
      given_factor.push_back(d["given_factor"].cast<float>());
    }
    if (PyErr_Occurred()) throw py::error_already_set();
  }
};

struct Calibration {
  mf_calibration c{};
  std::vector<bool> included;

  Calibration(int64_t rows, int64_t cols, int variant, bool per_tensor, double p, int eps_mode,
              bool guards, py::object clamp, double strength, double scale, int direction,
              py::sequence which) {
    c.rows = rows, c.cols = cols, c.variant = variant, c.per_tensor = per_tensor, c.p = p;
    c.eps_mode = eps_mode, c.guards = guards, c.strength = strength, c.scale = scale,
    c.direction = direction;
    c.has_clamp = !clamp.is_none();
    if (c.has_clamp) {
      const auto pair = clamp.cast<py::sequence>();
      c.clamp_low = pair[0].cast<double>(), c.clamp_high = pair[1].cast<double>();
    }
    for (py::handle x : which) included.push_back(x.cast<bool>());
  }
};

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;  // between the Philox streams of two experts

// Fields of a job tuple, in order; native.py builds it.
enum Field {
  kPlan,
  kNumel,
  kOffset,
  kTotal,
  kRankCols,
  kStream,
  kBase,
  kBaseDtype,
  kMerged,
  kMergedDtype,
  kOut,
  kOutDtype,
  kExperts,
  kExpertDtypes,
  kMasks,
  kTaskMasks,
  kCalibration,
  kCoefficient,
  kFactor,
  kRepaired,
  kNorms2,
  kSelection,
  kWeights,
  kWeightCols,
  kFields
};

struct Batch {
  std::vector<mf_job> jobs;
  std::vector<mf_expert> experts;

  explicit Batch(const py::list& list) {
    size_t total = 0;
    for (py::handle item : list) total += plan_of(item).experts.size();
    jobs.reserve(list.size());
    experts.reserve(total);
    for (py::handle item : list) add(py::reinterpret_borrow<py::tuple>(item));
    if (PyErr_Occurred()) throw py::error_already_set();
  }

 private:
  static Plan& plan_of(py::handle item) {
    if (!PyTuple_Check(item.ptr()) || PyTuple_GET_SIZE(item.ptr()) != kFields)
      throw py::value_error("job: expected a tuple of " + std::to_string((int)kFields) +
                            " fields.");
    return py::handle(PyTuple_GET_ITEM(item.ptr(), kPlan)).cast<Plan&>();
  }

  void add(const py::tuple& t) {
    const auto at = [&](int i) { return py::handle(PyTuple_GET_ITEM(t.ptr(), i)); };
    const Plan& plan = at(kPlan).cast<Plan&>();
    mf_job job = plan.job;
    job.numel = integer(at(kNumel)), job.offset = integer(at(kOffset)),
    job.total = integer(at(kTotal));
    job.rank_cols = integer(at(kRankCols));
    job.base = address<const void*>(at(kBase)), job.base_dtype = (int32_t)integer(at(kBaseDtype));
    job.merged = address<const void*>(at(kMerged)),
    job.merged_dtype = (int32_t)integer(at(kMergedDtype));
    job.out = address<void*>(at(kOut)), job.out_dtype = (int32_t)integer(at(kOutDtype));
    job.coefficient = address<float*>(at(kCoefficient)), job.factor = address<float*>(at(kFactor));
    job.repaired = address<uint8_t*>(at(kRepaired)), job.norms2 = address<double*>(at(kNorms2));
    job.weights = address<const float*>(at(kWeights)), job.weight_cols = integer(at(kWeightCols));
    const Calibration* calibration = nullptr;
    if (!at(kCalibration).is_none()) {
      calibration = &at(kCalibration).cast<Calibration&>();
      job.calibration = &calibration->c;
    }
    job.experts = experts.data() + experts.size();
    const uint64_t stream = PyLong_AsUnsignedLongLong(at(kStream).ptr());
    const size_t k = plan.experts.size();
    const py::handle pointers = at(kExperts), dtypes = at(kExpertDtypes);
    const py::handle masks = at(kMasks), task_masks = at(kTaskMasks);
    const auto wrong = [&](py::handle x) {
      return !PyTuple_Check(x.ptr()) || (size_t)PyTuple_GET_SIZE(x.ptr()) != k;
    };
    if (wrong(pointers) || wrong(dtypes) || (!masks.is_none() && wrong(masks)) ||
        (!task_masks.is_none() && wrong(task_masks)) ||
        (calibration && !calibration->included.empty() && calibration->included.size() != k))
      throw py::value_error("job: expected one entry per expert.");
    for (size_t i = 0; i < k; ++i) {
      const auto entry = [&](py::handle x) {
        return py::handle(PyTuple_GET_ITEM(x.ptr(), (Py_ssize_t)i));
      };
      mf_expert e = plan.experts[i];
      e.data = address<const void*>(entry(pointers));
      e.dtype = (int32_t)integer(entry(dtypes));
      e.stream = stream + (uint64_t)i * kGolden;
      if (!masks.is_none()) {
        e.mask = address<const uint8_t*>(entry(masks));
        if (e.mask) e.trim = MF_TRIM_GIVEN, e.factor = plan.given_factor[i];
      }
      if (!task_masks.is_none()) e.task_mask = address<const uint8_t*>(entry(task_masks));
      if (calibration && !calibration->included.empty()) e.included = calibration->included[i];
      experts.push_back(e);
    }
    if (!at(kSelection).is_none()) select(job, py::reinterpret_borrow<py::tuple>(at(kSelection)));
    jobs.push_back(job);
  }

  static void select(mf_job& job, const py::tuple& s) {
    const py::tuple threshold = s[0], tie_cut = s[1], top_threshold = s[2], top_cut = s[3],
                    factor = s[4], weights = s[6], alone = s[7], score_cut = s[8], score_top = s[9];
    job.selected = 1;
    job.majority = s[5].cast<int32_t>();
    for (int k = 0; k < job.num_experts; ++k) {
      mf_expert& e = job.experts[k];
      e.threshold = threshold[(size_t)k].cast<float>(),
      e.tie_cut = tie_cut[(size_t)k].cast<int64_t>();
      e.top_threshold = top_threshold[(size_t)k].cast<float>();
      e.top_tie_cut = top_cut[(size_t)k].cast<int64_t>();
      e.factor = factor[(size_t)k].cast<float>();
      if (!weights.empty()) e.weight = weights[(size_t)k].cast<float>();
      if (!alone.empty()) e.alone = alone[(size_t)k].cast<float>();
      if (score_cut.empty()) continue;
      e.score_cut = score_cut[(size_t)k].cast<float>();
      e.score_top = score_top[(size_t)k].cast<float>();
    }
  }
};

template <class F>
PyObject* tuple_of(const mf_job& job, F&& item) {
  PyObject* t = PyTuple_New(job.num_experts);
  if (!t) throw py::error_already_set();
  for (int k = 0; k < job.num_experts; ++k) PyTuple_SET_ITEM(t, k, item(job.experts[k]));
  return t;
}

// (threshold, tie_cut, top_threshold, top_tie_cut, factor, majority): the fields of a Selection.
py::tuple selection_of(const mf_job& job) {
  py::tuple t(6);
  const auto set = [&](int i, PyObject* x) { PyTuple_SET_ITEM(t.ptr(), i, x); };
  set(0, tuple_of(job, [](const mf_expert& e) { return PyFloat_FromDouble(e.threshold); }));
  set(1, tuple_of(job, [](const mf_expert& e) { return PyLong_FromLongLong(e.tie_cut); }));
  set(2, tuple_of(job, [](const mf_expert& e) { return PyFloat_FromDouble(e.top_threshold); }));
  set(3, tuple_of(job, [](const mf_expert& e) { return PyLong_FromLongLong(e.top_tie_cut); }));
  set(4, tuple_of(job, [](const mf_expert& e) { return PyFloat_FromDouble(e.factor); }));
  set(5, PyLong_FromLong(job.majority));
  return t;
}

// (selection, kept, first_nonfinite, base_nonfinite, merged_nonfinite, overflow)
py::tuple stats_of(const mf_job& job) {
  py::tuple t(6);
  const auto set = [&](int i, PyObject* x) { PyTuple_SET_ITEM(t.ptr(), i, x); };
  set(0, selection_of(job).release().ptr());
  set(1, tuple_of(job, [](const mf_expert& e) { return PyLong_FromLongLong(e.kept); }));
  set(2, tuple_of(job, [](const mf_expert& e) { return PyLong_FromLongLong(e.first_nonfinite); }));
  set(3, PyLong_FromLongLong(job.base_nonfinite));
  set(4, PyLong_FromLongLong(job.merged_nonfinite));
  set(5, PyLong_FromLongLong(job.overflow));
  return t;
}

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

Batch one(const py::tuple& job) {
  py::list list;
  list.append(job);
  return Batch(list);
}

void row_stats(const py::tuple& job, uintptr_t gram, uintptr_t dots, uintptr_t norm2, int threads,
               int isa) {
  Batch batch = one(job);
  const mf_options options{threads, isa};
  run([&] {
    return mf_cpu_row_stats(batch.jobs.data(), reinterpret_cast<double*>(gram),
                            reinterpret_cast<double*>(dots), reinterpret_cast<double*>(norm2),
                            &options);
  });
}

void gram(const py::tuple& job, int64_t cols, bool wide, uintptr_t out, int threads, int isa) {
  Batch batch = one(job);
  const mf_options options{threads, isa};
  run([&] {
    return mf_cpu_gram(batch.jobs.data(), cols, wide, reinterpret_cast<double*>(out), &options);
  });
}

void scale(const py::tuple& job, uintptr_t coefficient, int threads, int isa) {
  Batch batch = one(job);
  const mf_options options{threads, isa};
  run([&] {
    return mf_cpu_scale(batch.jobs.data(), reinterpret_cast<const float*>(coefficient), &options);
  });
}

void row_norms(const py::tuple& job, uintptr_t l1, uintptr_t l2, uintptr_t linf, int threads,
               int isa) {
  Batch batch = one(job);
  const mf_options options{threads, isa};
  run([&] {
    return mf_cpu_row_norms(batch.jobs.data(), reinterpret_cast<double*>(l1),
                            reinterpret_cast<double*>(l2), reinterpret_cast<double*>(linf),
                            &options);
  });
}

void norm_sums(const py::tuple& job, uintptr_t before, uintptr_t after, uintptr_t squares,
               int threads, int isa) {
  Batch batch = one(job);
  const mf_options options{threads, isa};
  run([&] {
    return mf_cpu_norm_sums(batch.jobs.data(), reinterpret_cast<double*>(before),
                            reinterpret_cast<double*>(after), reinterpret_cast<double*>(squares),
                            &options);
  });
}

void energies(const py::tuple& job, uintptr_t squares, int threads, int isa) {
  Batch batch = one(job);
  const mf_options options{threads, isa};
  run([&] {
    return mf_cpu_energies(batch.jobs.data(), reinterpret_cast<double*>(squares), &options);
  });
}

void holders(const py::tuple& job, uintptr_t alone, uintptr_t shared, int threads, int isa) {
  Batch batch = one(job);
  const mf_options options{threads, isa};
  run([&] {
    return mf_cpu_holders(batch.jobs.data(), reinterpret_cast<int64_t*>(alone),
                          reinterpret_cast<int64_t*>(shared), &options);
  });
}

void score_counts(const py::tuple& job, const std::vector<uint32_t>& prefix, uintptr_t counts,
                  uintptr_t top, int threads, int isa) {
  Batch batch = one(job);
  const mf_options options{threads, isa};
  run([&] {
    return mf_cpu_score_counts(batch.jobs.data(), prefix.empty() ? nullptr : prefix.data(),
                               reinterpret_cast<int64_t*>(counts), reinterpret_cast<uint32_t*>(top),
                               &options);
  });
}

py::tuple select_variance(const py::tuple& job, double fraction, int threads, int isa) {
  Batch batch = one(job);
  const mf_options options{threads, isa};
  float threshold = 0;
  int64_t tie_cut = 0;
  run([&] {
    return mf_cpu_select_variance(batch.jobs.data(), fraction, &threshold, &tie_cut, &options);
  });
  return py::make_tuple(threshold, tie_cut);
}

int64_t vote_sum(const py::tuple& job, int threads, int isa) {
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
  explicit Search(const py::tuple& prototype) : prototype_(one(prototype)) {
    check(mf_search_begin(prototype_.jobs.data(), &search_));
  }
  ~Search() { mf_search_end(search_); }
  Search(const Search&) = delete;
  Search& operator=(const Search&) = delete;

  void sample(const py::tuple& piece) {
    Batch batch = one(piece);
    run([&] { return mf_search_sample(search_, batch.jobs.data()); });
  }
  void feed(const py::tuple& piece, int threads, int isa) {
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
  m.doc() = "Fused merge and calibration on the CPU. Use it through magic_fast.ops.native.";
  py::class_<Plan>(m, "Plan").def(py::init<py::dict, py::sequence>());
  py::class_<Calibration>(m, "Calibration")
      .def(py::init<int64_t, int64_t, int, bool, double, int, bool, py::object, double, double, int,
                    py::sequence>());
  py::class_<Search>(m, "Search")
      .def(py::init<const py::tuple&>())
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
