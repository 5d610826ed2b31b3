// Jobs as Python hands them down: tuples of integers and addresses, what a plan says once for many
// of them, and calibrations. Refusals of the loops as exceptions.
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

}  // namespace
