"""The toolchain: from a published MiniCPM-V checkpoint to a bundle that `mcv_runtime` runs."""
