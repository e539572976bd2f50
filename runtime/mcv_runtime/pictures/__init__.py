"""Pictures and videos: opened, checked and cut into slices and patches. May import `bundle` and `files`."""
