"""A merged model as a directory: written, and read again."""
