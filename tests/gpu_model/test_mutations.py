"""The model of GPUs finds what it is there for: each of these changes to the package shows in it."""

import pytest

from tests.gpu_model.mutations import MUTATIONS, find

NUM_SEEDS = 5


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_is_found_and_the_package_is_not(mutation):
    assert find(mutation, mutation.case, NUM_SEEDS) is not None
    assert find(None, mutation.case, num_seeds=1) is None


def test_each_defect_of_streams_has_its_mutation():
    assert {1, 2, 3, 7, 8, 9, 15} <= {mutation.defect for mutation in MUTATIONS}
