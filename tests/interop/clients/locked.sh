# Runs a command as an unprivileged user on a read-only root, in namespaces that `unshare` made.
#
#   unshare --mount --net --pid --fork sh locked.sh BASE COMMAND...
#
# BASE is the Python below the environment: it may lie in root's home, which others cannot enter.
set -e
base=$1
shift
mount --make-rprivate /
mount --bind "$base" /mnt
mount -t tmpfs -o mode=0755,size=1m tmpfs /root
mkdir -p "$base"
mount --move /mnt "$base"
mount -o remount,ro /root
# Of these the mounts, with "bind", and not the file systems, which the machine outside has too.
mount -o remount,ro,bind /
mount -o remount,ro,bind /dev/shm
mount -t proc -o hidepid=invisible proc /proc
ip link set lo up
exec setpriv --reuid 10001 --regid 10001 --clear-groups --bounding-set -all --inh-caps -all \
    --no-new-privs "$@"
