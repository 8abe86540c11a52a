"""Every Numba kernel, one file per concern; private: the public functions validate, allocate and call these."""
