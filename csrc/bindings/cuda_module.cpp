// Python's view of the CUDA kernels: addresses and streams as integers in, exceptions out.
//
// SAFETY: the caller (magic_fast/ops/cuda/calls.py) keeps every array alive until the stream has
// passed, and has checked shapes, dtypes, contiguity and overlap.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "magic_fast_cuda.h"

#if !defined(MF_CUDA_MODULE)
#define MF_CUDA_MODULE _cuda
#endif

namespace py = pybind11;

namespace {

void check(mf_status status) {
  if (status == MF_OK) return;
  const std::string message = mf_cuda_last_error();
  if (status == MF_INVALID) throw py::value_error(message);
  throw std::runtime_error(message);
}

using Address = uintptr_t;

template <class T>
T* pointer(Address x) {
  return reinterpret_cast<T*>(x);
}

struct Job {
  mf_gpu_job job{};

  Job(Address base, int base_dtype, Address merged, int merged_dtype, Address out, int out_dtype,
      const std::vector<Address>& experts, const std::vector<int>& dtypes,
      const std::vector<int>& kinds, const std::vector<Address>& masks,
      const std::vector<Address>& task_masks, Address integers, Address numbers, Address report,
      Address kept, int64_t offset, const std::vector<int>& rule) {
    const size_t k = experts.size();
    if (k < 1 || k > MF_GPU_MOST_EXPERTS) throw py::value_error("experts: expected 1 to 64");
    if (dtypes.size() != k || kinds.size() != k || masks.size() != k || task_masks.size() != k)
      throw py::value_error("dtypes, kinds, masks: expected one an expert");
    if (rule.size() != 10) throw py::value_error("rule: expected 10 words");
    job.base = pointer<void>(base), job.merged = pointer<void>(merged);
    job.out = pointer<void>(out);
    job.base_dtype = (int8_t)base_dtype, job.merged_dtype = (int8_t)merged_dtype;
    job.out_dtype = (int8_t)out_dtype;
    for (size_t i = 0; i < k; ++i) {
      job.experts[i] = pointer<void>(experts[i]);
      job.masks[i] = pointer<uint8_t>(masks[i]);
      job.task_masks[i] = pointer<uint8_t>(task_masks[i]);
      job.dtypes[i] = (uint8_t)dtypes[i], job.kinds[i] = (uint8_t)kinds[i];
    }
    job.integers = pointer<int64_t>(integers), job.numbers = pointer<float>(numbers);
    job.report = pointer<int64_t>(report), job.kept = pointer<int64_t>(kept);
    job.offset = offset, job.k = (int32_t)k;
    job.rule = {(int8_t)rule[0], (int8_t)rule[1], (int8_t)rule[2], (int8_t)rule[3],
                (int8_t)rule[4], (int8_t)rule[5], (int8_t)rule[6], (int8_t)rule[7],
                (int8_t)rule[8], (int8_t)rule[9]};
  }
};

struct Search {
  mf_gpu_search s{};

  Search(Address sample, Address state, Address heavy, Address bins, Address coarse, Address above,
         Address equals, Address places, Address counts, int64_t numel, int64_t size, int64_t runs,
         int64_t run, int64_t segments, int64_t length, int log_bins, int scans, int key) {
    s = {pointer<int32_t>(sample),
         pointer<int64_t>(state),
         pointer<int32_t>(heavy),
         pointer<int32_t>(bins),
         pointer<int64_t>(coarse),
         pointer<int64_t>(above),
         pointer<int64_t>(equals),
         pointer<const int64_t>(places),
         pointer<const int64_t>(counts),
         numel,
         size,
         runs,
         run,
         segments,
         length,
         log_bins,
         scans,
         key};
  }
};

void merge(const Job& job, int64_t rows, int64_t cols, Address factors, bool keeps, int processors,
           Address stream) {
  check(mf_cuda_merge(&job.job, rows, cols, pointer<float>(factors), keeps, nullptr, processors,
                      pointer<void>(stream)));
}

void merge_table(const Job& job, Address rows, Address block_job, Address block_start,
                 int64_t blocks, bool aligned, int processors, Address stream) {
  const mf_gpu_table table = {pointer<int64_t>(rows), pointer<int64_t>(block_job),
                              pointer<int64_t>(block_start), blocks, aligned};
  check(mf_cuda_merge(&job.job, 1, 0, nullptr, 0, &table, processors, pointer<void>(stream)));
}

void rows(const Job& job, int64_t n_rows, int64_t cols, int variant, double p, int eps_mode,
          bool guards, py::object clamp, double strength, double scale, int direction,
          const std::vector<bool>& included, Address coefficient, Address repaired, Address norms2,
          Address pairs, Address powers, Address work, bool keeps, int processors, Address stream) {
  mf_gpu_rows r{};
  mf_calibration& c = r.policy;
  c.rows = n_rows, c.cols = cols, c.variant = variant, c.p = p, c.eps_mode = eps_mode;
  c.guards = guards, c.strength = strength, c.scale = scale, c.direction = direction;
  c.has_clamp = !clamp.is_none();
  if (c.has_clamp) {
    const auto pair = clamp.cast<std::pair<double, double>>();
    c.clamp_low = pair.first, c.clamp_high = pair.second;
  }
  std::vector<uint8_t> counts(included.begin(), included.end());
  if (counts.size() != (size_t)job.job.k) throw py::value_error("included: expected one an expert");
  r.included = counts.data();
  r.coefficient = pointer<float>(coefficient), r.repaired = pointer<uint8_t>(repaired);
  r.norms2 = pointer<double>(norms2), r.pairs = pointer<double>(pairs);
  r.powers = pointer<double>(powers), r.work = pointer<double>(work), r.keeps = keeps;
  check(mf_cuda_rows(&job.job, &r, processors, pointer<void>(stream)));
}

void run_select(const Job& job, const Search& search, Address sorted,
                const std::vector<int>& owners, const std::vector<bool>& tops,
                const std::vector<int>& ties, Address integers, Address stream) {
  mf_gpu_targets t{};
  if (owners.empty() || owners.size() > 2 * MF_GPU_MOST_EXPERTS || tops.size() != owners.size() ||
      ties.size() != owners.size())
    throw py::value_error("targets: expected one to two an expert");
  t.count = (int32_t)owners.size();
  for (size_t i = 0; i < owners.size(); ++i) {
    t.owner[i] = owners[i], t.top[i] = tops[i], t.ties[i] = (int8_t)ties[i];
  }
  check(mf_cuda_select(&job.job, &search.s, pointer<int32_t>(sorted), &t,
                       pointer<int64_t>(integers), pointer<void>(stream)));
}

}  // namespace

PYBIND11_MODULE(MF_CUDA_MODULE, m) {
  m.attr("__all__") = py::list();
  m.def("build", &mf_cuda_build);
  py::class_<Job>(m, "Job").def(
      py::init<Address, int, Address, int, Address, int, const std::vector<Address>&,
               const std::vector<int>&, const std::vector<int>&, const std::vector<Address>&,
               const std::vector<Address>&, Address, Address, Address, Address, int64_t,
               const std::vector<int>&>(),
      py::kw_only(), py::arg("base"), py::arg("base_dtype"), py::arg("merged"),
      py::arg("merged_dtype"), py::arg("out"), py::arg("out_dtype"), py::arg("experts"),
      py::arg("dtypes"), py::arg("kinds"), py::arg("masks"), py::arg("task_masks"),
      py::arg("integers"), py::arg("numbers"), py::arg("report"), py::arg("kept"),
      py::arg("offset"), py::arg("rule"));
  py::class_<Search>(m, "Search")
      .def(py::init<Address, Address, Address, Address, Address, Address, Address, Address, Address,
                    int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, int>(),
           py::kw_only(), py::arg("sample"), py::arg("state"), py::arg("heavy"), py::arg("bins"),
           py::arg("coarse"), py::arg("above"), py::arg("equals"), py::arg("places"),
           py::arg("counts"), py::arg("numel"), py::arg("size"), py::arg("runs"), py::arg("run"),
           py::arg("segments"), py::arg("length"), py::arg("log_bins"), py::arg("scans"),
           py::arg("key"));
  m.def("merge", &merge, py::arg("job"), py::arg("rows"), py::arg("cols"), py::arg("factors"),
        py::arg("keeps"), py::arg("processors"), py::arg("stream"));
  m.def("merge_table", &merge_table, py::arg("job"), py::arg("rows"), py::arg("block_job"),
        py::arg("block_start"), py::arg("blocks"), py::arg("aligned"), py::arg("processors"),
        py::arg("stream"));
  m.def("rows", &rows, py::arg("job"), py::arg("rows"), py::arg("cols"), py::arg("variant"),
        py::arg("p"), py::arg("eps_mode"), py::arg("guards"), py::arg("clamp"), py::arg("strength"),
        py::arg("scale"), py::arg("direction"), py::arg("included"), py::arg("coefficient"),
        py::arg("repaired"), py::arg("norms2"), py::arg("pairs"), py::arg("powers"),
        py::arg("work"), py::arg("keeps"), py::arg("processors"), py::arg("stream"));
  m.def("rows_work", &mf_cuda_rows_work);
  m.def("sample", [](const Job& job, const Search& search, Address stream) {
    check(mf_cuda_sample(&job.job, &search.s, pointer<void>(stream)));
  });
  m.def("select", &run_select, py::arg("job"), py::arg("search"), py::arg("sorted"),
        py::arg("owners"), py::arg("tops"), py::arg("ties"), py::arg("integers"),
        py::arg("stream"));
  m.def("norm_sums", [](const Job& job, int64_t numel, int power, Address partial, Address stream) {
    check(
        mf_cuda_norm_sums(&job.job, numel, power, pointer<double>(partial), pointer<void>(stream)));
  });
  m.def("vote_sum", [](const Job& job, int64_t numel, Address sum, Address stream) {
    check(mf_cuda_vote_sum(&job.job, numel, pointer<int64_t>(sum), pointer<void>(stream)));
  });
  m.def("held", [](const Job& job, int64_t numel, Address counts, Address stream) {
    check(mf_cuda_held(&job.job, numel, pointer<int64_t>(counts), pointer<void>(stream)));
  });
  m.def("keep_varied", [](const Job& job, int64_t numel, Address mask, Address stream) {
    check(mf_cuda_keep_varied(&job.job, numel, pointer<uint8_t>(mask), pointer<void>(stream)));
  });
  m.def("magnitudes", [](const Job& job, int64_t numel, Address bits, Address stream) {
    check(mf_cuda_magnitudes(&job.job, numel, pointer<int32_t>(bits), pointer<void>(stream)));
  });
  m.def("keep_ranked",
        [](Address order, Address mask, int64_t n_rows, int64_t cols, int64_t offset, int64_t word,
           int64_t seed, double low, double span, double density, Address stream) {
          check(mf_cuda_keep_ranked(pointer<int64_t>(order), pointer<uint8_t>(mask), n_rows, cols,
                                    offset, (uint64_t)word, (uint64_t)seed, low, span, density,
                                    pointer<void>(stream)));
        });
}
