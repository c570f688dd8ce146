// The entry of a program that runs PARTS times at once: see cpu_parts.py.
void inductor_entry_impl(AtenTensorHandle* input_handles, AtenTensorHandle* output_handles) {
    py::gil_scoped_release_simple release;
    std::exception_ptr failures[PARTS] = {};
    #pragma omp parallel for num_threads(PARTS) schedule(static, 1)
    for (int part = 0; part < PARTS; part++) {
        try {
            one_part(input_handles + part * INPUTS, output_handles + part * OUTPUTS);
        } catch (...) {
            failures[part] = std::current_exception();
        }
    }
    for (auto& failure : failures) if (failure) std::rethrow_exception(failure);
}
