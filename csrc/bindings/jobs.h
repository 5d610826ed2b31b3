// Jobs as Python hands them down: integers and addresses by name, what a plan says once for many of
// them, and calibrations. Refusals of the loops as exceptions.
#pragma once

#include <pybind11/pybind11.h>

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
    job.tie_rule = get("tie_rule");
    job.rescale = get("rescale");
    job.vote = get("vote");
    job.vote_on = get("vote_on");
    job.zero_vote = get("zero_vote");
    job.contributors = get("contributors");
    job.reduce = get("reduce");
    job.consensus = get("consensus");
    job.min_tasks = get("min_tasks");
    job.least = recipe["least"].cast<float>();
    job.limit = recipe["limit"].cast<float>();
    job.alone = get("alone");
    job.limited = get("limited");
    job.competes = get("competes");
    for (py::handle item : per_expert) {
      const auto d = py::reinterpret_borrow<py::dict>(item);
      mf_expert e{};
      e.weight = d["weight"].cast<float>();
      e.trim = (int32_t)integer(d["trim"]);
      e.count = integer(d["count"]);
      e.top_count = integer(d["top_count"]);
      e.density = d["density"].cast<double>();
      e.epsilon = d["epsilon"].cast<double>();
      e.random_bound = (uint32_t)integer(d["random_bound"]);
      e.lambda = d["lambda"].cast<float>();
      e.factor = d["factor"].cast<float>();
      e.threshold = d["threshold"].cast<float>();
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
    c.rows = rows;
    c.cols = cols;
    c.variant = variant;
    c.per_tensor = per_tensor;
    c.p = p;
    c.eps_mode = eps_mode;
    c.guards = guards;
    c.strength = strength;
    c.scale = scale;
    c.direction = direction;
    c.has_clamp = !clamp.is_none();
    if (c.has_clamp) {
      const auto pair = clamp.cast<py::sequence>();
      c.clamp_low = pair[0].cast<double>();
      c.clamp_high = pair[1].cast<double>();
    }
    for (py::handle x : which) included.push_back(x.cast<bool>());
  }
};

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;  // between the Philox streams of two experts

// The fields of a job, a dict from magic_fast/ops/native/jobs.py. Those up to `expert_dtypes` must
// be there, what else is left out is 0 or None; a name that is not listed here is refused.
// clang-format off
#define MF_JOB_FIELDS(X) \
  X(plan) X(numel) X(offset) X(total) X(experts) X(expert_dtypes) \
  X(rank_cols) X(stream) X(base) X(base_dtype) X(merged) X(merged_dtype) X(out) X(out_dtype) \
  X(masks) X(task_masks) X(calibration) X(coefficient) X(repaired) X(norms2) X(selection) \
  X(weights) X(weight_cols)
// clang-format on

enum class Field {
#define MF_ENTRY(name) name,
  MF_JOB_FIELDS(MF_ENTRY) count
#undef MF_ENTRY
};
constexpr int kFields = (int)Field::count, kRequired = (int)Field::expert_dtypes + 1;

// Their names, interned: a look-up compares pointers.
PyObject* const* field_names() {
  static PyObject* const names[kFields] = {
#define MF_ENTRY(name) PyUnicode_InternFromString(#name),
      MF_JOB_FIELDS(MF_ENTRY)
#undef MF_ENTRY
  };
  return names;
}

// The fields of one job, borrowed from its dict.
class Fields {
 public:
  explicit Fields(py::handle job) {
    if (!PyDict_Check(job.ptr())) throw py::value_error("job: expected a dict of its fields.");
    PyObject *name = nullptr, *value = nullptr;
    Py_ssize_t place = 0;
    int next = 0;  // they come in the order of the list, some left out
    while (PyDict_Next(job.ptr(), &place, &name, &value)) {
      const int field = find(name, next);
      if (field < 0) refuse("is not known", name);
      at_[field] = value;
      next = field + 1;
    }
    for (int i = 0; i < kRequired; ++i)
      if (!at_[i]) refuse("is missing", field_names()[i]);
  }

  // None where it was left out.
  py::handle operator[](Field f) const { return at_[(int)f] ? at_[(int)f] : Py_None; }
  // 0 where it was left out.
  int64_t number(Field f) const { return at_[(int)f] ? integer(at_[(int)f]) : 0; }
  template <class T>
  T pointer(Field f) const {
    return at_[(int)f] ? address<T>(at_[(int)f]) : nullptr;
  }

 private:
  // Where `name` stands in the list, looked for from `first` on; -1: nowhere.
  static int find(PyObject* name, int first) {
    PyObject* const* names = field_names();
    for (int i = first; i < kFields; ++i)
      if (names[i] == name) return i;
    for (int i = 0; i < first; ++i)
      if (names[i] == name) return i;
    for (int i = 0; i < kFields; ++i)  // a string of its own
      if (PyUnicode_Check(name) && PyUnicode_Compare(names[i], name) == 0) return i;
    return -1;
  }

  [[noreturn]] static void refuse(const char* what, py::handle name) {
    throw py::value_error("job: field '" + py::str(name).cast<std::string>() + "' " + what + ".");
  }

  PyObject* at_[kFields] = {};
};

struct Batch {
  std::vector<mf_job> jobs;
  std::vector<mf_expert> experts;

  explicit Batch(const py::list& list) {
    std::vector<Fields> fields;
    fields.reserve(list.size());
    size_t total = 0;
    for (py::handle item : list) {
      fields.emplace_back(item);
      total += fields.back()[Field::plan].cast<Plan&>().experts.size();
    }
    jobs.reserve(list.size());
    experts.reserve(total);
    for (const Fields& f : fields) add(f);
    if (PyErr_Occurred()) throw py::error_already_set();
  }

 private:
  void add(const Fields& f) {
    const Plan& plan = f[Field::plan].cast<Plan&>();
    mf_job job = plan.job;
    job.numel = f.number(Field::numel);
    job.offset = f.number(Field::offset);
    job.total = f.number(Field::total);
    job.rank_cols = f.number(Field::rank_cols);
    job.base = f.pointer<const void*>(Field::base);
    job.base_dtype = (int32_t)f.number(Field::base_dtype);
    job.merged = f.pointer<const void*>(Field::merged);
    job.merged_dtype = (int32_t)f.number(Field::merged_dtype);
    job.out = f.pointer<void*>(Field::out);
    job.out_dtype = (int32_t)f.number(Field::out_dtype);
    job.coefficient = f.pointer<float*>(Field::coefficient);
    job.repaired = f.pointer<uint8_t*>(Field::repaired);
    job.norms2 = f.pointer<double*>(Field::norms2);
    job.weights = f.pointer<const float*>(Field::weights);
    job.weight_cols = f.number(Field::weight_cols);
    const Calibration* calibration = nullptr;
    if (const py::handle c = f[Field::calibration]; !c.is_none()) {
      calibration = &c.cast<Calibration&>();
      job.calibration = &calibration->c;
    }
    job.experts = experts.data() + experts.size();
    const py::handle counter = f[Field::stream];
    const uint64_t stream = counter.is_none() ? 0 : PyLong_AsUnsignedLongLong(counter.ptr());
    const size_t k = plan.experts.size();
    const py::handle pointers = f[Field::experts], dtypes = f[Field::expert_dtypes];
    const py::handle masks = f[Field::masks], task_masks = f[Field::task_masks];
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
        if (e.mask) {
          e.trim = MF_TRIM_GIVEN;
          e.factor = plan.given_factor[i];
        }
      }
      if (!task_masks.is_none()) e.task_mask = address<const uint8_t*>(entry(task_masks));
      if (calibration && !calibration->included.empty()) e.included = calibration->included[i];
      experts.push_back(e);
    }
    if (const py::handle found = f[Field::selection]; !found.is_none()) select(job, found);
    jobs.push_back(job);
  }

  // `found`: a Selection.
  static void select(mf_job& job, py::handle found) {
    const auto numbers = [&](const char* name) { return py::tuple(found.attr(name)); };
    const py::tuple threshold = numbers("threshold"), tie_cut = numbers("tie_cut");
    const py::tuple top_threshold = numbers("top_threshold"), top_cut = numbers("top_tie_cut");
    const py::tuple factor = numbers("factor"), weights = numbers("weights");
    const py::tuple alone = numbers("alone"), score_cut = numbers("score_cut");
    const py::tuple score_top = numbers("score_top");
    job.selected = 1;
    job.majority = found.attr("majority").cast<int32_t>();
    for (int k = 0; k < job.num_experts; ++k) {
      mf_expert& e = job.experts[k];
      e.threshold = threshold[(size_t)k].cast<float>();
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

}  // namespace
