// What a library built on a newer glibc asks for beyond 2.28, under the names that 2.28 has: manylinux_2_28 allows no
// newer one. kernel-builder compiles against an old glibc and needs none of this. scripts/check_build.py says when a
// function is missing here; CMakeLists.txt redirects its calls (--wrap). libstdc++ is that of GCC 8 there.
#include <features.h>

#include <new>
#include <sstream>

#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))

#if defined(__x86_64__)
#define FIRST_GLIBC "GLIBC_2.2.5"
#else
#define FIRST_GLIBC "GLIBC_2.17"
#endif

extern "C" {

// GLIBC_2.32. libstdc++ asks it whether reference counts may do without atomic instructions: they may not.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

// The versions after these differ in how errors are reported, or in the library that defines them.
#define AS_OF_FIRST_GLIBC(result, function, parameters, arguments)    \
  __asm__(".symver first_" #function ", " #function "@" FIRST_GLIBC); \
  result first_##function parameters;                                 \
  __attribute__((visibility("hidden"))) result __wrap_##function parameters { return first_##function arguments; }

// GLIBCXX_3.4.29: std::__throw_bad_array_new_length()
__attribute__((visibility("hidden"), noreturn)) void __wrap__ZSt28__throw_bad_array_new_lengthv() {
  throw std::bad_array_new_length();
}

AS_OF_FIRST_GLIBC(double, exp, (double x), (x))  // GLIBC_2.29
// GLIBC_2.34, of torch's headers from 2.15 on too
AS_OF_FIRST_GLIBC(void*, dlopen, (const char* name, int flags), (name, flags))
AS_OF_FIRST_GLIBC(void*, dlsym, (void* library, const char* symbol), (library, symbol))
}

// What headers expect of a newer libstdc++, instantiated here.
template std::basic_stringstream<char>::basic_stringstream();    // GLIBCXX_3.4.26
template std::basic_ostringstream<char>::basic_ostringstream();  // GLIBCXX_3.4.26
#if __cplusplus > 201703L
template std::string std::basic_stringbuf<char>::str() const&;  // GLIBCXX_3.4.29
template std::string std::basic_stringbuf<char>::str() &&;      // GLIBCXX_3.4.29
#endif

#endif
