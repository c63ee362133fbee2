// PyInit_<name> of an empty abi3 module, so that `import <name>` loads the library and
// runs its op registrations. Where Python.h is not installed, the few declarations that
// are needed are taken from the stable ABI (PEP 384), whose layout is frozen.
// kernel-builder's own registration.h has a REGISTER_EXTENSION for this, but needs Python.h and is there in its builds
// alone; scripts/build.py builds without both.
#pragma once

#if __has_include(<Python.h>)
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x03090000
#endif
#include <Python.h>
#else
#include <cstddef>
extern "C" {
struct PyObject {
  ptrdiff_t ob_refcnt;
  void* ob_type;
};
struct PyModuleDef_Base {
  PyObject ob_base;
  PyObject* (*m_init)(void);
  ptrdiff_t m_index;
  PyObject* m_copy;
};
struct PyModuleDef {
  PyModuleDef_Base m_base;
  const char* m_name;
  const char* m_doc;
  ptrdiff_t m_size;
  void *m_methods, *m_slots, *m_traverse, *m_clear, *m_free;
};
PyObject* PyModule_Create2(PyModuleDef*, int);
}
#define PyModuleDef_HEAD_INIT {{1, nullptr}, nullptr, 0, nullptr}
#define PyModule_Create(def) PyModule_Create2(def, 3)
#define PyMODINIT_FUNC extern "C" __attribute__((visibility("default"))) PyObject*
#endif

#define LORA_FUSED_CONCAT_(a, b) a##b
#define LORA_FUSED_CONCAT(a, b) LORA_FUSED_CONCAT_(a, b)
#define LORA_FUSED_STRINGIFY_(a) #a
#define LORA_FUSED_STRINGIFY(a) LORA_FUSED_STRINGIFY_(a)

#define LORA_FUSED_PYTHON_MODULE(name)                                                                               \
  PyMODINIT_FUNC LORA_FUSED_CONCAT(PyInit_, name)() {                                                                \
    static PyModuleDef def = {                                                                                       \
        PyModuleDef_HEAD_INIT, LORA_FUSED_STRINGIFY(name), nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr}; \
    return PyModule_Create(&def);                                                                                    \
  }
