# A Conan 2 recipe (docs/18-consuming.md). Untested: Conan was not at hand. It builds the source beside it.
import os

from conan import ConanFile
from conan.errors import ConanInvalidConfiguration
from conan.tools.cmake import CMake, CMakeDeps, CMakeToolchain, cmake_layout
from conan.tools.files import copy
from conan.tools.gnu import PkgConfigDeps
from conan.tools.scm import Version


class Strait(ConanFile):
    name = "strait"
    version = "0.1.0"
    description = "Shared-memory channels you can co_await, on Asio (C++20 modules)"
    license = "BSL-1.0"
    package_type = "static-library"
    settings = "os", "arch", "compiler", "build_type"
    options = {"with_mimalloc": [True, False]}
    default_options = {"with_mimalloc": True}

    def export_sources(self):
        source = os.path.join(self.recipe_folder, "..", "..")
        for pattern in ("CMakeLists.txt", "LICENSE", "cmake/*", "include/*", "modules/*", "runtime/*"):
            copy(self, pattern, source, self.export_sources_folder)

    def requirements(self):
        # The importer includes Asio itself, and it must be the one that strait was compiled with.
        self.requires("asio/1.30.2", transitive_headers=True)
        self.requires("hwloc/2.9.3")
        if self.options.with_mimalloc:
            self.requires("mimalloc/2.1.7")

    def build_requirements(self):
        self.tool_requires("cmake/[>=3.28]")
        self.tool_requires("ninja/[>=1.11]")
        self.tool_requires("pkgconf/[>=2]")

    def validate(self):
        compiler = self.settings.compiler
        if self.settings.os != "Linux":
            raise ConanInvalidConfiguration(f"strait needs Linux, found {self.settings.os}")
        if compiler != "clang" or Version(compiler.version) < "19":
            raise ConanInvalidConfiguration(f"strait needs clang 19 or newer, found {compiler} {compiler.version}")

    def layout(self):
        cmake_layout(self)

    def generate(self):
        CMakeDeps(self).generate()
        PkgConfigDeps(self).generate()  # hwloc is found with pkg-config
        toolchain = CMakeToolchain(self, generator="Ninja")
        for part in ("TESTS", "BENCH", "EXAMPLES", "TOOL", "WARNINGS_AS_ERRORS"):
            toolchain.cache_variables[f"STRAIT_{part}"] = False
        toolchain.cache_variables["STRAIT_MIMALLOC"] = bool(self.options.with_mimalloc)
        toolchain.generate()

    def build(self):
        cmake = CMake(self)
        cmake.configure()
        cmake.build()

    def package(self):
        CMake(self).install()

    def package_info(self):
        # Modules are found through the package's own config file; what Conan would generate knows nothing of them.
        self.cpp_info.set_property("cmake_find_mode", "none")
        self.cpp_info.builddirs = [os.path.join("lib", "cmake", "strait")]
