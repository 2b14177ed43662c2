#include "mapped-file.h"

#include "errors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <utility>

namespace omnivlm {

MappedFile::MappedFile(const std::string & path) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        throw ModelFileError(path + ": cannot be opened (" + std::strerror(errno) + "); check the path");
    }
    struct stat status{};
    void *      mapping = MAP_FAILED;
    const bool  regular = fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
    if (regular && status.st_size > 0) {
        mapping = mmap(nullptr, static_cast<size_t>(status.st_size), PROT_READ, MAP_SHARED, fd, 0);
    }
    close(fd);
    if (!regular) {
        throw ModelFileError(path + ": is not a regular file; name a GGUF file");
    }
    if (status.st_size == 0) {
        throw ModelFileError(path + ": is empty; download or convert it again");
    }
    if (mapping == MAP_FAILED) {
        throw ModelFileError(path + ": cannot be mapped into memory (" + std::strerror(errno) + ")");
    }
    data_ = static_cast<char *>(mapping);
    size_ = static_cast<size_t>(status.st_size);
}

MappedFile::~MappedFile() {
    if (data_ != nullptr) {
        munmap(data_, size_);
    }
}

void MappedFile::release(const void * start, size_t bytes) const {
    const char * first = static_cast<const char *>(start);
    if (data_ == nullptr || first < data_ || first + bytes > data_ + size_) {
        return;  // a copy, not the mapping
    }
    const auto   page   = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const auto   offset = static_cast<size_t>(first - data_);
    const size_t begin  = offset / page * page;
    madvise(data_ + begin, offset + bytes - begin, MADV_DONTNEED);  // rounds the end up
}

void release_mappings(const std::string & path) {
    struct stat wanted{};
    if (stat(path.c_str(), &wanted) != 0) {
        return;
    }
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {  // start-end permissions offset major:minor inode path
        uintptr_t     start = 0, end = 0;
        char          permissions[5] = {};
        unsigned long inode          = 0;
        const int     found = std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " %4s %*x %*x:%*x %lu", &start, &end,
                                          permissions, &inode);
        // A private mapping that was written to would lose what was written.
        if (found == 4 && inode == wanted.st_ino && permissions[1] == '-' && permissions[3] == 's') {
            madvise(reinterpret_cast<void *>(start), end - start, MADV_DONTNEED);
        }
    }
}

MappedFile::MappedFile(MappedFile && other) noexcept {
    *this = std::move(other);
}

MappedFile & MappedFile::operator=(MappedFile && other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

}  // namespace omnivlm
