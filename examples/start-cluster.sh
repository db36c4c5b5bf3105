#!/usr/bin/env bash
# Starts a tracker, an index, an origin and two agents on this machine, each in a process of its own
# with its own data directory, and stops them in good order on Ctrl-C.
#
#   examples/start-cluster.sh [DIRECTORY]      data and logs, default ./swarmpull-cluster
set -euo pipefail

config=$(cd "$(dirname "$0")" && pwd)/cluster.toml
directory=${1:-./swarmpull-cluster}
names=()
declare -A pids

stop_all() {
    trap '' INT TERM
    local status=$1 i name
    # Agents first, so that they can still tell the tracker that they leave.
    for ((i = ${#names[@]} - 1; i >= 0; i--)); do
        name=${names[i]}
        kill -TERM "${pids[$name]}" 2>/dev/null || true
        local ended=0
        wait "${pids[$name]}" || ended=$?
        # 143: SIGTERM met it before it had begun to serve, and there was nothing to end.
        if ((ended == 0)) || { ((ended == 143)) && [ ! -s "$directory/$name.listening" ]; }; then
            echo "stopped $name"
        else
            echo "$name ended with status $ended, see $directory/$name.log" >&2
            status=1
        fi
    done
    exit "$status"
}

# start NAME OPTION...: start a process and wait until it serves; it prints its listeners then.
start() {
    local name=$1
    shift
    rm -f "$directory/$name.listening"
    # A session of its own: Ctrl-C in the terminal reaches this script only, which stops them in order.
    setsid swarmpull run --config "$config" --data-dir "$directory" "$@" \
        >"$directory/$name.listening" 2>"$directory/$name.log" </dev/null &
    names+=("$name")
    pids[$name]=$!
    until [ -s "$directory/$name.listening" ]; do
        if ! kill -0 "${pids[$name]}" 2>/dev/null; then
            echo "$name did not start:" >&2
            tail -n 5 "$directory/$name.log" >&2
            stop_all 1
        fi
        sleep 0.1
    done
    sed "s/^/$name: /" "$directory/$name.listening"
}

command -v swarmpull >/dev/null || { echo "swarmpull is not on PATH: pip install . first" >&2; exit 1; }
mkdir -p "$directory"
trap 'stop_all 0' INT TERM

start tracker --role tracker
start index --role index
start origin --role origin
start agent-1 --role agent -o agent.data_dir="$directory/agent-1"
start agent-2 --role agent -o agent.data_dir="$directory/agent-2" \
    -o agent.registry.listen=127.0.0.1:5001 \
    -o agent.peer.listen=127.0.0.1:7101 \
    -o agent.admin.listen=127.0.0.1:7501

cat <<TEXT

The cluster runs; data and logs are in $directory.
Push an image through the first agent, and pull it through the second:
  skopeo copy --dest-tls-verify=false docker-daemon:IMAGE:TAG docker://127.0.0.1:5000/IMAGE:TAG
  docker pull 127.0.0.1:5001/IMAGE:TAG
Push any file, and pull it by the digest that is printed:
  swarmpull push FILE
  swarmpull pull --registry http://127.0.0.1:5001 DIGEST -o FILE
See what they hold and where it came from:
  swarmpull status
Stop with Ctrl-C.
TEXT

# The first process that ends by itself ends the cluster.
wait -n || true
echo "a process ended by itself, stopping the others" >&2
stop_all 1
