"""From slices to visual tokens: tower, slice batches, caches of encoded pictures. May import `sessions` and `pictures`."""
