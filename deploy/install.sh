#!/bin/sh
# Installs the serving half into a virtual environment of its own: no torch, no compiler, no pip.
#
#   deploy/install.sh PREFIX [cpu|gpu]
#
# The Dockerfile runs it, and so does an operator without containers. cpu takes the small build of
# onnxruntime, which shares its module with the GPU build that pyproject.toml names; gpu takes that
# one with the CUDA libraries it asks for, and leaves only the driver to the host.
set -eu

prefix=${1:?usage: deploy/install.sh PREFIX [cpu|gpu]}
device=${2:-cpu}
python=${PYTHON:-python3}
source=$(cd "$(dirname "$0")/.." && pwd)
pins=$source/constraints.txt
version=$(sed -n 's/^onnxruntime-gpu==//p' "$pins")

case $device in
cpu) onnxruntime="onnxruntime==$version" ;;
gpu) onnxruntime="onnxruntime-gpu[cuda,cudnn]==$version" ;;
*)
    echo "deploy/install.sh: $device: choose cpu or gpu" >&2
    exit 2
    ;;
esac

requirements=$("$python" - "$source/pyproject.toml" <<'PYTHON'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
wanted = project["dependencies"] + project["optional-dependencies"].get("grpc", [])
print(*(line for line in wanted if not line.startswith("onnxruntime")), sep="\n")
PYTHON
)

install() {
    "$python" -m pip --python "$prefix" --disable-pip-version-check install \
        --quiet --constraint "$pins" "$@"
}

list=$(mktemp)
trap 'rm -f "$list"' EXIT
printf '%s\n' "$requirements" >"$list"
"$python" -m venv --without-pip "$prefix"
install --requirement "$list" "$onnxruntime"
# A clone that moved on keeps its version: without force the old code would stay, and modules that
# it no longer has would come back out of what an older build left.
rm -rf "$source/build"
install --no-deps --force-reinstall "$source"
echo "installed in $prefix, $(du -sm "$prefix" | cut -f1) MiB: $prefix/bin/anomalyd"
