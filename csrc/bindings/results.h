// What a job came to, as Python takes it.
#pragma once

#include <pybind11/pybind11.h>

#include "magic_fast.h"

namespace py = pybind11;

namespace {

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

}  // namespace
