#!/usr/bin/env bash
# Does a cluster that was made of the chart or of swarmpull.yaml work?  A file is pushed to an origin, and pulled
# through the agent of every node at once; needs kubectl alone, and leaves nothing behind but that file.
#
#   examples/kubernetes/check.sh [NAMESPACE [RELEASE]]
#
# Where pushes need a password: SWARMPULL_USER and SWARMPULL_PASSWORD.
set -euo pipefail
namespace=${1:-swarmpull} release=${2:-swarmpull}
megabytes=16 # of 64 MiB that pods have in /tmp
k() { kubectl --namespace "$namespace" "$@"; }

for each in statefulset/{tracker,index,origin} daemonset/agent; do
    k rollout status --timeout=10m "${each%/*}/$release-${each#*/}"
done

login=()
[ -z "${SWARMPULL_USER:-}" ] || login=(--user "$SWARMPULL_USER" --password-file -)
origin=$release-origin-0
trap 'k exec "$origin" -- rm -f /tmp/check' EXIT
k exec "$origin" -- sh -c "head -c ${megabytes}M /dev/urandom > /tmp/check"
digest=$(k exec -i "$origin" -- swarmpull push -q --registry http://127.0.0.1:5100 "${login[@]}" /tmp/check \
    <<<"${SWARMPULL_PASSWORD:-}")
echo "pushed: $digest"

# One line for each node; the digest is computed where the file has arrived, once more than swarmpull does.
pull() {
    local pod=$1 node=$2 got
    got=$(k exec "$pod" -c agent -- sh -c "swarmpull pull -q $digest -o - | sha256sum") || return
    [ "${got%% *}" = "${digest#sha256:}" ] && echo "pulled: $node"
}
agents=$(k get pods -l "app.kubernetes.io/component=agent,app.kubernetes.io/instance=$release" \
    -o 'jsonpath={range .items[*]}{.metadata.name} {.spec.nodeName}{"\n"}{end}')
failed=0 running=()
while read -r pod node; do
    pull "$pod" "$node" </dev/null &
    running+=("$! $node")
done <<<"$agents"
for each in "${running[@]}"; do
    wait "${each% *}" || { echo "NOT pulled: ${each#* }" >&2; failed=1; }
done
exit $failed
