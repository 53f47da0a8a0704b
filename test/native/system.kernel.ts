import {spawnSync} from 'node:child_process';
import {mkdtempSync, rmdirSync, statSync} from 'node:fs';
import {tmpdir} from 'node:os';
import path from 'node:path';
import test, {type ExecutionContext} from 'ava';
import {native} from '../../src/native.js';
import {bpffs, cgroup, kernelError, listener, network, sockaddr, tcp} from './helpers.js';

function directory(t: ExecutionContext): string {
	const made = mkdtempSync(path.join(tmpdir(), 'sidestep-native-'));
	t.teardown(() => {
		rmdirSync(made);
	});
	return made;
}

test('an exclusive lock keeps everybody out, and shared ones keep an exclusive one out', t => {
	const locked = directory(t);
	const exclusive = native.lock(locked, 'exclusive');
	kernelError(t, 'EAGAIN', () => native.lock(locked, 'exclusive'));
	const error = kernelError(t, 'EAGAIN', () => native.lock(locked, 'shared'));
	t.is(error.syscall, 'flock');
	t.is(error.subject, locked);
	native.closeFd(exclusive);

	const first = native.lock(locked, 'shared');
	const second = native.lock(locked, 'shared');
	kernelError(t, 'EAGAIN', () => native.lock(locked, 'exclusive'));
	native.closeFd(first);
	native.closeFd(second);
	native.closeFd(native.lock(locked, 'exclusive'));
});

test('a lock is held against other processes too, and not inherited by them', t => {
	const locked = directory(t);
	const fd = native.lock(locked, 'exclusive');
	const flock = () => spawnSync('flock', ['--nonblock', locked, 'true']).status;
	t.is(flock(), 1);
	const longer = spawnSync('sh', ['-c', 'sleep 5 >/dev/null 2>&1 & echo $!'], {encoding: 'utf8'});
	native.closeFd(fd);
	t.is(flock(), 0);
	process.kill(Number(longer.stdout));
});

test('lock tells a missing directory, a file and a wrong mode apart', t => {
	kernelError(t, 'ENOENT', () => native.lock('/nonexistent', 'exclusive'));
	kernelError(t, 'ENOTDIR', () => native.lock('/etc/passwd', 'exclusive'));
	t.throws(() => native.lock('/tmp', 'both' as never), {instanceOf: TypeError});
});

test('mountBpffs makes a bpffs that only root may enter, unmount ends it', t => {
	const mounted = directory(t);
	const before = native.filesystemType(mounted);
	native.mountBpffs(mounted);
	t.is(native.filesystemType(mounted), 0xca_fe_4a_11n);
	t.is(statSync(mounted).mode & 0o777, 0o700);
	native.unmount(mounted);
	t.is(native.filesystemType(mounted), before);
	kernelError(t, 'EINVAL', () => {
		native.unmount(mounted);
	});
	kernelError(t, 'ENOENT', () => native.filesystemType('/nonexistent'));
	kernelError(t, 'ENOENT', () => {
		native.mountBpffs('/nonexistent');
	});
});

test('filesystemType tells a cgroup2 directory', t => {
	t.is(native.filesystemType(cgroup(t)), 0x63_67_72_70n);
	t.is(native.filesystemType(bpffs(t)), 0xca_fe_4a_11n);
	t.is(native.filesystemType('/proc/self/ns/net'), 0x6e_73_66_73n);
});

test('a cgroup\'s id is the inode number of its directory', t => {
	const made = cgroup(t);
	t.is(native.cgroupId(made), statSync(made, {bigint: true}).ino);
	kernelError(t, 'ENOENT', () => native.cgroupId('/nonexistent'));
});

test('capabilities are those that /proc tells', t => {
	const status = spawnSync('grep', ['CapEff', `/proc/${process.pid}/status`], {encoding: 'utf8'}).stdout;
	t.is(native.capabilities(), BigInt(`0x${status.trim().split('\t')[1]}`));
});

test('socket calls give what the kernel gives, and its errno', t => {
	const netns = network(t);
	const {fd, port} = listener(t, netns);
	t.deepEqual(native.getsockname(fd), sockaddr([127, 0, 0, 1], port));
	kernelError(t, 'ENOTCONN', () => native.getpeername(fd));
	kernelError(t, 'EADDRINUSE', () => {
		native.bind(tcp(t, netns), sockaddr([127, 0, 0, 1], port));
	});
	native.setsockopt(fd, 1, 36, Uint8Array.of(0x39, 5, 0, 0));
	t.deepEqual(native.getsockopt(fd, 1, 36, 4), Uint8Array.of(0x39, 5, 0, 0));
	kernelError(t, 'ENOPROTOOPT', () => native.getsockopt(fd, 1, 9999, 4));
	kernelError(t, 'ENOTSOCK', () => native.getsockopt(netns.fd, 1, 36, 4));
	kernelError(t, 'EBADF', () => {
		native.closeFd(1_000_000);
	});
	t.throws(() => native.getsockopt(-1, 1, 36, 4), {instanceOf: RangeError});
	t.throws(() => native.getsockopt(fd, 1, 36, 1e9), {instanceOf: RangeError});
});

test('an error tells the errno of its own call, not of one before', t => {
	const netns = network(t);
	const fd = tcp(t, netns);
	for (let round = 0; round < 20; round++) {
		kernelError(t, 'EBADF', () => native.getsockname(1_000_000));
		kernelError(t, 'ECONNREFUSED', () => {
			native.connect(fd, sockaddr([127, 0, 0, 1], 1));
		});
		kernelError(t, 'ENOPROTOOPT', () => native.getsockopt(fd, 1, 9999, 4));
	}
});

test('poll tells a connection that waits, and returns 0 in time without one', t => {
	const netns = network(t);
	const {fd, port} = listener(t, netns);
	const started = performance.now();
	t.is(native.poll(fd, 1, 30), 0);
	t.true(performance.now() - started >= 29);
	native.connect(tcp(t, netns), sockaddr([127, 0, 0, 1], port));
	t.is(native.poll(fd, 1, 5000), 1);
	native.closeFd(native.accept(fd, 0o4000));
	kernelError(t, 'EINVAL', () => native.accept(tcp(t, netns)));
});
