"""The cluster that the other tests here rely on."""

from __future__ import annotations

from pathlib import Path

from cluster import Cluster


def test_a_job_gets_both_nodes_and_all_their_gpus(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1 --gres=gpu:a800:8 --mem=400G --cpus-per-task=64\n"
        "srun --label bash -c 'echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES'\nexit 5\n"
    )
    (ended,) = cluster.wait(cluster.submit(script, options=[f"--output={tmp_path}/%j.log"]))
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 5, 0)
    assert sorted(cluster.output(ended).splitlines()) == [
        f"{number}: {node} 0,1,2,3,4,5,6,7" for number, node in enumerate(cluster.nodes)
    ]
