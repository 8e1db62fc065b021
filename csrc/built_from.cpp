// What the extension was built from. A file of its own, because it is compiled again after every change of a source.

namespace bam {

extern const char* const built_from = BAM_BUILT_FROM;

}  // namespace bam
