#!/usr/bin/env bash
# A real Slurm cluster on one machine, for the tests: a controller and NODES nodes, each with a network, a host
# name and an sshd of its own, and 8 pretend GPUs. Needs root and Debian's slurmctld, slurmd, munge, iproute2.
#
#   unshare --mount --pid --fork --kill-child --mount-proc bash cluster.sh FOLDER NODES
#
# prints "ready" and lasts until its standard input ends; in whatever way it ends, the kernel then takes every
# process, mount and network of the cluster along. FOLDER is new and its path short (Unix sockets allow 108
# bytes). FOLDER/on NODE COMMAND… runs a command on a node; `ctl` is the controller, where jobs are submitted.
set -euo pipefail
folder=$1 nodes=$2
gpus=8 net=10.77.0 # the bridge is in a network namespace: clusters side by side don't see each other
PATH=$PATH:/usr/sbin:/sbin

mkdir -p "$folder"/{state,spool,log,munge,ssh,gpu}
chmod 711 "$folder/munge"
head -c 128 /dev/urandom >"$folder/munge/key" && chmod 400 "$folder/munge/key"
for ((i = 0; i < gpus; i++)); do ln -s /dev/null "$folder/gpu/$i"; done
mount --make-rprivate /
mount -t tmpfs tmpfs /run # names of network namespaces and sockets, for this cluster only
mkdir -p /run/sshd /run/netns

network() {
  ip netns add ctl
  ip -n ctl link set lo up
  ip -n ctl link add br0 type bridge
  ip -n ctl addr add $net.254/24 dev br0
  ip -n ctl link set br0 up
  printf '127.0.0.1 localhost\n%s ctl\n' $net.254 >"$folder/hosts"
  for ((i = 1; i <= nodes; i++)); do
    ip netns add "n$i"
    ip -n "n$i" link set lo up
    ip -n "n$i" link add eth0 type veth peer name "v$i" netns ctl
    ip -n "n$i" addr add $net.$i/24 dev eth0
    ip -n "n$i" link set eth0 up
    ip -n ctl link set "v$i" master br0 up
    echo "$net.$i n$i" >>"$folder/hosts"
  done
}

ssh_between_nodes() {
  ssh-keygen -q -t ed25519 -N '' -f "$folder/ssh/id"
  ssh-keygen -q -t ed25519 -N '' -f "$folder/ssh/hostkey"
  cat >"$folder/ssh/ssh_config" <<CONFIG
Host *
  IdentityFile $folder/ssh/id
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
CONFIG
  cat >"$folder/ssh/sshd_config" <<CONFIG
HostKey $folder/ssh/hostkey
PidFile none
AuthorizedKeysFile $folder/ssh/id.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
CONFIG
}

slurm_conf() {
  cat >"$folder/slurm.conf" <<CONFIG
ClusterName=test
SlurmctldHost=ctl($net.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/sock
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdLogFile=$folder/log/slurmd-%n.log
SlurmdSpoolDir=$folder/spool/%n
StateSaveLocation=$folder/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=20
SlurmdTimeout=15
MessageTimeout=10
TCPTimeout=2
MinJobAge=36000
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-$nodes] CPUs=32 RealMemory=20000 Gres=gpu:$gpus
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF
CONFIG
  printf 'AutoDetect=off\nName=gpu File=%s/gpu/[0-%d]\n' "$folder" $((gpus - 1)) >"$folder/gres.conf"
}

# From inside and outside the cluster alike: pid 1 of its process namespace is this script.
write_on() {
  cat >"$folder/on" <<SCRIPT
#!/usr/bin/env bash
export SLURM_CONF=$folder/slurm.conf PATH=\$PATH:/usr/sbin:/sbin
enter=()
[ "\$(readlink /proc/1/ns/pid)" = "$(readlink /proc/self/ns/pid)" ] ||
  enter=(nsenter --mount --pid --wd="\$PWD" --target "\$(cat $folder/pid)")
exec "\${enter[@]}" nsenter --net=/run/netns/"\$1" unshare --uts --mount --propagation slave sh -c '
  hostname "\$0"; mount --bind $folder/hosts /etc/hosts; mount --bind $folder/ssh /etc/ssh; exec "\$@"' "\$@"
SCRIPT
  chmod +x "$folder/on"
}

network
ssh_between_nodes
slurm_conf
write_on
export SLURM_CONF=$folder/slurm.conf
munged --key-file="$folder/munge/key" --socket="$folder/munge/sock" --pid-file="$folder/munge/pid" \
  --log-file="$folder/log/munged.log" --seed-file="$folder/munge/seed" --force </dev/null
"$folder/on" ctl slurmctld -c </dev/null
for ((i = 1; i <= nodes; i++)); do
  "$folder/on" "n$i" slurmd -c </dev/null
  "$folder/on" "n$i" /usr/sbin/sshd -f /etc/ssh/sshd_config </dev/null
done
for ((i = 0; i < 200; i++)); do
  [ "$("$folder/on" ctl sinfo -h -p gpu -t idle -o %D 2>/dev/null)" = "$nodes" ] && break
  sleep 0.1
done
"$folder/on" ctl sinfo -N -o "%N %P %t %c %G %E" >"$folder/log/sinfo"
echo ready
read -r || true
