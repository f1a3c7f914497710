"""The process that owns a local Ray: ``python -m asa_dist.rollout.ray_head``, started by `cluster.start_local_ray`.

It reads one JSON line of options from stdin, starts Ray, answers one JSON line on stdout, and ends Ray when stdin
closes: so Ray ends with the process that asked for it, however that process dies.
"""

from __future__ import annotations

import json
import os
import shutil
import sys


def main() -> None:
    options = json.loads(sys.stdin.readline())
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)  # whatever else is printed goes to the log
        import ray

        context = ray.init(
            num_cpus=options["num_cpus"], num_gpus=options["num_gpus"],
            object_store_memory=options["object_store_bytes"], _temp_dir=options["temp_dir"],
            _node_ip_address="127.0.0.1", include_dashboard=False, log_to_driver=False)
        json.dump({"address": context.address_info["gcs_address"]}, answer)
    sys.stdin.read()
    ray.shutdown()
    if options["remove_temp_dir"]:
        shutil.rmtree(options["temp_dir"], ignore_errors=True)


if __name__ == "__main__":
    main()
