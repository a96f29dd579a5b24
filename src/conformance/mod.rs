//! Golden files, random problems, and the one routine that checks a backend with them.
