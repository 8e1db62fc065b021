"""GradientCache over DistributedDataParallel and sharded models, in processes over gloo, against a loop by hand."""

import gradient_cache_ranks as ranks
import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")

BOUND = 1e-12  # float64


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> dict[str, list[dict]]:
    """Results of two ranks by program."""
    programs = (ranks.forms, ranks.unequal, ranks.failing, ranks.equal_shards, ranks.refusals, ranks.allowed)
    return ranks.run(programs, 2, tmp_path_factory.mktemp("pair"))


def close(differences: dict, buffers: int) -> None:
    assert len(differences["gradients"]) > 0 and len(differences["buffers"]) == buffers
    assert all(difference <= BOUND for name in ("gradients", "buffers") for difference in differences[name])


def test_forms_of_distributed_data_parallel(pair):
    """Gradients and buffers as by hand; each exchanged once a step, whatever is around or within the replica."""
    for results in pair["forms"]:
        for form, result in results.items():
            assert len(result["steps"]) == 3
            for differences in result["steps"]:
                close(differences, buffers=6)
            assert result["broadcasts"] == [0 if form == "own buffers" else 3] * (2 if form == "two DDPs" else 1), form
            if form == "small buckets":
                assert result["exchanges"] > 3
            else:  # a static graph is learned in the first pass with a graph, which has to exchange
                assert result["exchanges"] == (4 if "static graph" in form else 3), form


def test_ranks_with_different_numbers_of_micro_batches(pair):
    for results in pair["unequal"]:
        for form, result in results.items():
            assert len(result["steps"]) == (4 if "static graph" in form else 3)
            for differences in result["steps"]:
                close(differences, buffers=6)


def test_a_step_after_one_that_failed(pair):
    """The model fails in any of the four passes over two micro-batches; DistributedDataParallel goes on as it was."""
    for results in pair["failing"]:
        assert len(results) == 4
        for fails, result in results.items():
            assert result["message"] == "failed", fails
            assert result["flags"] == [True, True], fails
            close(result, buffers=6)


def test_sharded_models(pair):
    for results in pair["equal_shards"]:
        for differences in results.values():
            close(differences, buffers=3)


LAYERS = {
    "SyncBatchNorm": "SyncBatchNorm",
    "fully_shard": "parameters that are DTensor",
    "fully_shard after a pass without gradient": "parameters that are DTensor",
    "FullyShardedDataParallel": "FullyShardedDataParallel",
    "teacher": "parameters that are DTensor",
    "static graph": "DistributedDataParallel(static_graph=True) in its first step",
}


def test_different_numbers_are_refused_where_each_pass_exchanges(pair):
    """On every rank, before any pass; also where one rank has none, and where torch's default device is meta."""
    for rank, results in enumerate(pair["refusals"]):
        assert len(results) == 3 * len(LAYERS)
        for (name, first), (message, passes) in results.items():
            numbers = (first, {1: 2, 2: 3, 0: 1}[first])
            assert passes == 0
            assert message == (
                "GradientCache: the number of micro_batches must be equal on all ranks, because layers communicate in "
                f"every pass ({LAYERS[name]}); got {numbers[rank]} on this rank, {numbers[0]} to {numbers[1]} on all "
                "ranks"
            )


def test_numbers_are_compared_only_where_passes_exchange(pair):
    for results in pair["allowed"]:
        message, _ = results["SyncBatchNorm of a rank alone"]
        assert "expected input tensor to be on GPU" in message  # torch's words, from the forward pass
        assert {name: count for name, (_, count) in results.items()} == dict.fromkeys(results, 0)
        assert [results[name][0] for name in ("DDP", "SyncBatchNorm in evaluation")] == ["no error"] * 2


@pytest.mark.slow
def test_every_rank_is_told_through_groups_of_two(tmp_path):
    (four,) = ranks.run((ranks.told_by_others,), 4, tmp_path).values()
    for rank, results in enumerate(four):
        for message in results.values():
            assert f"got {2 if rank == 2 else 1} on this rank, 1 to 2 on all ranks" in message
