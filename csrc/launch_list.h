// A list of launches, recorded as they ran, that runs again on other memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

namespace bam {

using Address = std::uintptr_t;

// A place in the memory of a later run: `offset` bytes after base number `base`.
struct Place {
  std::size_t base;
  Address offset;
};

// Turns the addresses of a launch into pointers. A launch must ask for its addresses in the same order whenever it
// runs: in statements or in braces, since C++ leaves the order of a function's arguments open.
class Memory {
 public:
  // The memory that addresses name. noted: gets every address that is asked for; or null.
  explicit Memory(std::vector<Address>* noted) : noted_(noted) {}
  // The memory of a later run: the place of each address, in the order of asking. All arguments outlive this object.
  Memory(const std::vector<Place>& places, const std::vector<Address>& bases) : places_(&places), bases_(&bases) {}

  template <class T>
  T* as(Address address) const {
    if (!address) return nullptr;
    if (noted_) noted_->push_back(address);
    return reinterpret_cast<T*>(places_ ? next() : address);
  }

 private:
  Address next() const {
    const Place& place = places_->at(asked_++);
    return bases_->at(place.base) + place.offset;
  }

  std::vector<Address>* noted_ = nullptr;
  const std::vector<Place>* places_ = nullptr;
  const std::vector<Address>* bases_ = nullptr;
  mutable std::size_t asked_ = 0;
};

class LaunchList {
 public:
  using Launch = std::function<void(const Memory&, void* stream)>;

  void add(Launch launch, std::vector<Address> addresses) {
    launches_.push_back({std::move(launch), std::move(addresses), {}});
  }
  std::size_t size() const { return launches_.size(); }
  // Addresses that launch i used, in the order of asking.
  const std::vector<Address>& addresses(std::size_t i) const { return launches_.at(i).addresses; }
  // Say once where each address of launch i will be.
  void place(std::size_t i, std::vector<Place> places) {
    if (places.size() != addresses(i).size()) throw std::invalid_argument("a place is needed for each address");
    launches_.at(i).places = std::move(places);
  }

  // Run launches first .. last - 1 on memory at these bases. Changes nothing, so that threads may share a list.
  void run(std::size_t first, std::size_t last, const std::vector<Address>& bases, void* stream) const {
    for (std::size_t i = first; i < last; ++i) launches_.at(i).launch(Memory(launches_[i].places, bases), stream);
  }

 private:
  struct Recorded {
    Launch launch;
    std::vector<Address> addresses;
    std::vector<Place> places;
  };
  std::vector<Recorded> launches_;
};

}  // namespace bam
