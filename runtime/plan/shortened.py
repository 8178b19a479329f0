"""A spec with fewer microbatches whose list costs less to simulate, and peaks and bubbles like the whole one."""

from trimaran.runtime.spec import RunSpec


def shortened(spec: RunSpec) -> RunSpec:
    """Return the spec with no more microbatches than fill its pipeline several times over, for its peak is the same."""
    parallel, train = spec.parallel, spec.train
    most = 4 * parallel.pp
    if parallel.schedule_file is not None or spec.num_microbatches <= most:
        return spec
    batch = most * train.micro_batch_size * parallel.dp
    return spec.model_copy(update={"train": train.model_copy(update={"global_batch_size": batch})})
