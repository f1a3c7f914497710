#!/bin/bash
# On Debian or Ubuntu, as root: the daemons and tools that tests/cluster needs. None of them is started.
set -euo pipefail
cd "$(dirname "$0")/../.."

packages=$(sed -n 's/^PACKAGES = "\(.*\)"$/\1/p' tests/cluster/hosts.py)
if [[ ! -e /usr/sbin/policy-rc.d ]]; then
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d  # apt starts no daemon
    chmod +x /usr/sbin/policy-rc.d
fi
apt-get update -qq
# shellcheck disable=SC2086  # names of packages are words
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages
