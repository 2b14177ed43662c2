// A whole file mapped read-only into memory; unmapped on destruction. The file must not be made shorter
// meanwhile: the operating system answers reads behind the new end with SIGBUS.

#pragma once

#include <cstddef>
#include <string>

namespace omnivlm {

class MappedFile {
  public:
    MappedFile() = default;
    explicit MappedFile(const std::string & path);  // throws ModelFileError
    ~MappedFile();

    MappedFile(MappedFile && other) noexcept;
    MappedFile & operator=(MappedFile && other) noexcept;
    MappedFile(const MappedFile &)             = delete;
    MappedFile & operator=(const MappedFile &) = delete;

    char * data() const { return data_; }  // page-aligned

    size_t size() const { return size_; }

    // Gives every page that this range touches back to the system; they are read from the file again when touched.
    void release(const void * start, size_t bytes) const;

  private:
    char * data_ = nullptr;
    size_t size_ = 0;
};

// Gives the pages of every mapping of a file in this process back to the system, whoever made it; they are read from
// the file again when touched. Does nothing where the system does not list mappings (/proc/self/maps).
void release_mappings(const std::string & path);

}  // namespace omnivlm
