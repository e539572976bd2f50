"""Many processes, machines too, that answer the rows of one table or batch. May import `engine` and what it may."""
