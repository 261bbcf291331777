// The short way from Python to an op without gradient; see NativeCall in fastbandit/ops/_register.py
// for when it applies. A call does what that docstring says with Python's own C interface: of torch
// it knows the objects that it is given, no header and no library.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <cstddef>

namespace {

constexpr Py_ssize_t kMaxArguments = 32;

struct NativeCall {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  PyObject* op;                  // called with the arguments as they are
  PyObject* tensor_type;         // of the first argument, exactly
  PyObject* served;              // set of device types that have kernels
  PyObject* is_grad_enabled;
  PyObject* below_autograd;      // a context manager
  PyObject* increment_versions;  // of a tuple of tensors
  PyObject* miss;                // what is returned where this call does not apply
  PyObject *is_cpu, *is_cuda, *requires_grad, *enter, *exit, *cpu, *cuda;  // names
  Py_ssize_t arguments;
  unsigned tensors, mutated;  // a bit for each argument
};

constexpr size_t kObjects[] = {
    offsetof(NativeCall, op),           offsetof(NativeCall, tensor_type),
    offsetof(NativeCall, served),       offsetof(NativeCall, is_grad_enabled),
    offsetof(NativeCall, below_autograd), offsetof(NativeCall, increment_versions),
    offsetof(NativeCall, miss),         offsetof(NativeCall, is_cpu),
    offsetof(NativeCall, is_cuda),      offsetof(NativeCall, requires_grad),
    offsetof(NativeCall, enter),        offsetof(NativeCall, exit),
    offsetof(NativeCall, cpu),          offsetof(NativeCall, cuda)};

PyObject*& object_at(NativeCall* self, size_t offset) {
  return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(self) + offset);
}

// 1, 0, or -1 with an error set.
int truth(PyObject* object, PyObject* attribute) {
  PyObject* value = PyObject_GetAttr(object, attribute);
  if (value == nullptr) return -1;
  const int result = PyObject_IsTrue(value);
  Py_DECREF(value);
  return result;
}

int truth_of_call(PyObject* function) {
  PyObject* value = PyObject_CallNoArgs(function);
  if (value == nullptr) return -1;
  const int result = PyObject_IsTrue(value);
  Py_DECREF(value);
  return result;
}

// Whether the kernels of one device can take all tensors as they are: 1, 0, or -1 with an error set.
int applies(NativeCall* self, PyObject* const* args) {
  const int on_cpu = truth(args[0], self->is_cpu);
  if (on_cpu < 0) return -1;
  if (on_cpu == 0) {
    const int on_cuda = truth(args[0], self->is_cuda);
    if (on_cuda <= 0) return on_cuda;
  }
  const int has_kernels = PySet_Contains(self->served, on_cpu ? self->cpu : self->cuda);
  if (has_kernels <= 0) return has_kernels;
  const int grad = truth_of_call(self->is_grad_enabled);
  if (grad < 0) return -1;
  for (Py_ssize_t index = 0; index < self->arguments; ++index) {
    if ((self->tensors >> index & 1) == 0 || args[index] == Py_None) continue;
    // Tensors of several devices would go to a kernel of another device, or to none.
    const int same = truth(args[index], self->is_cpu);
    if (same < 0) return -1;
    if (same != on_cpu) return 0;
    if (grad) {
      const int wants = truth(args[index], self->requires_grad);
      if (wants != 0) return wants < 0 ? -1 : 0;
    }
  }
  return 1;
}

// The op's result, or null with an error set.
PyObject* run(NativeCall* self, PyObject* const* args) {
  PyObject* guard = PyObject_CallNoArgs(self->below_autograd);
  if (guard == nullptr) return nullptr;
  PyObject* entered = PyObject_CallMethodNoArgs(guard, self->enter);
  if (entered == nullptr) {
    Py_DECREF(guard);
    return nullptr;
  }
  Py_DECREF(entered);
  PyObject* result =
      PyObject_Vectorcall(self->op, args, static_cast<size_t>(self->arguments), nullptr);
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  PyObject* left =
      PyObject_CallMethodObjArgs(guard, self->exit, Py_None, Py_None, Py_None, nullptr);
  Py_DECREF(guard);
  if (left == nullptr) {  // its error is the one to tell
    Py_XDECREF(result);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    return nullptr;
  }
  Py_DECREF(left);
  PyErr_Restore(type, value, traceback);
  return result;
}

// The caller's other way says what is wrong with its arguments; anything else is not for it.
PyObject* miss_or_error(NativeCall* self) {
  if (PyErr_Occurred() != nullptr) {
    if (!PyErr_ExceptionMatches(PyExc_RuntimeError) && !PyErr_ExceptionMatches(PyExc_TypeError) &&
        !PyErr_ExceptionMatches(PyExc_AttributeError))
      return nullptr;
    PyErr_Clear();
  }
  Py_INCREF(self->miss);
  return self->miss;
}

PyObject* call(PyObject* object, PyObject* const* args, size_t flags, PyObject* names) {
  NativeCall* const self = reinterpret_cast<NativeCall*>(object);
  if (names != nullptr || PyVectorcall_NARGS(flags) != self->arguments ||
      reinterpret_cast<PyObject*>(Py_TYPE(args[0])) != self->tensor_type || applies(self, args) != 1)
    return miss_or_error(self);
  PyObject* result = run(self, args);
  if (result == nullptr) return miss_or_error(self);
  if (self->mutated != 0) {
    PyObject* written = PyTuple_New(__builtin_popcount(self->mutated));
    Py_ssize_t place = 0;
    for (Py_ssize_t index = 0; written != nullptr && index < self->arguments; ++index) {
      if ((self->mutated >> index & 1) == 0) continue;
      Py_INCREF(args[index]);
      PyTuple_SET_ITEM(written, place++, args[index]);
    }
    PyObject* done = written == nullptr
                         ? nullptr
                         : PyObject_CallOneArg(self->increment_versions, written);
    Py_XDECREF(written);
    if (done == nullptr) {
      Py_DECREF(result);
      return nullptr;
    }
    Py_DECREF(done);
  }
  return result;
}

bool name(PyObject*& place, const char* text) {
  return (place = PyUnicode_InternFromString(text)) != nullptr;
}

PyObject* create(PyTypeObject* type, PyObject* args, PyObject* keywords) {
  static const char* const kNames[] = {
      "op",     "arguments",       "tensors",        "mutated",            "tensor_type",
      "served", "is_grad_enabled", "below_autograd", "increment_versions", "miss",
      nullptr};
  PyObject *op, *tensor_type, *served, *is_grad_enabled, *below_autograd, *increment, *miss;
  Py_ssize_t arguments;
  unsigned tensors, mutated;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "OnIIOO!OOOO", const_cast<char**>(kNames), &op,
                                   &arguments, &tensors, &mutated, &tensor_type, &PySet_Type,
                                   &served, &is_grad_enabled, &below_autograd, &increment, &miss))
    return nullptr;
  if (arguments < 1 || arguments > kMaxArguments) {
    PyErr_Format(PyExc_ValueError, "arguments: expected 1 to %zd, got %zd", kMaxArguments,
                 arguments);
    return nullptr;
  }
  const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
  NativeCall* self = reinterpret_cast<NativeCall*>(allocate(type, 0));
  if (self == nullptr) return nullptr;
  self->vectorcall = call;
  self->arguments = arguments;
  self->tensors = tensors;
  self->mutated = mutated;
  PyObject* const given[] = {op, tensor_type, served, is_grad_enabled, below_autograd, increment,
                             miss};
  for (size_t index = 0; index < sizeof(given) / sizeof(given[0]); ++index) {
    Py_INCREF(given[index]);
    object_at(self, kObjects[index]) = given[index];
  }
  if (!name(self->is_cpu, "is_cpu") || !name(self->is_cuda, "is_cuda") ||
      !name(self->requires_grad, "requires_grad") || !name(self->enter, "__enter__") ||
      !name(self->exit, "__exit__") || !name(self->cpu, "cpu") || !name(self->cuda, "cuda")) {
    Py_DECREF(self);
    return nullptr;
  }
  return reinterpret_cast<PyObject*>(self);
}

int traverse(PyObject* object, visitproc visit, void* arg) {
  NativeCall* const self = reinterpret_cast<NativeCall*>(object);
  for (const size_t offset : kObjects) Py_VISIT(object_at(self, offset));
  Py_VISIT(Py_TYPE(object));
  return 0;
}

int clear(PyObject* object) {
  NativeCall* const self = reinterpret_cast<NativeCall*>(object);
  for (const size_t offset : kObjects) Py_CLEAR(object_at(self, offset));
  return 0;
}

void destroy(PyObject* object) {
  PyTypeObject* const type = Py_TYPE(object);
  PyObject_GC_UnTrack(object);
  clear(object);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(object);
  Py_DECREF(type);
}

PyMemberDef kMembers[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(NativeCall, vectorcall), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr}};

PyType_Slot kSlots[] = {
    {Py_tp_doc, const_cast<char*>("Calls an op below autograd, or returns `miss`.")},
    {Py_tp_new, reinterpret_cast<void*>(create)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(clear)},
    {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
    {Py_tp_members, kMembers},
    {0, nullptr}};

PyType_Spec kType = {"fastbandit._native_call.NativeCall", sizeof(NativeCall), 0,
                     Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL, kSlots};

int fill(PyObject* module) {
  PyObject* type = PyType_FromSpec(&kType);
  if (type == nullptr) return -1;
  const int code = PyModule_AddObjectRef(module, "NativeCall", type);
  Py_DECREF(type);
  return code;
}

PyModuleDef_Slot kModuleSlots[] = {{Py_mod_exec, reinterpret_cast<void*>(fill)}, {0, nullptr}};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT,
                       "_native_call",
                       "The short way from Python to the native kernels.",
                       0,
                       nullptr,
                       kModuleSlots,
                       nullptr,
                       nullptr,
                       nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native_call() { return PyModuleDef_Init(&kModule); }
