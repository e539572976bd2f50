"""Documents: files of several pages, each a picture to ask about. May import `pictures`, `files` and `errors`."""
