import {spawnSync} from 'node:child_process';
import {unlinkSync} from 'node:fs';
import test, {type ExecutionContext} from 'ava';
import {type BpfProgram, native} from '../../src/native.js';
import {AF_INET, SOCK_STREAM, bpffs, cgroup, held, kernelError, loaded, portOf, sockaddr} from './helpers.js';

const connect4 = 10;

/** A listener on the host's loopback, and whether a process inside `directory` may connect to it. */
function reach(t: ExecutionContext, directory: string): () => boolean {
	const host = held(t, native.openNetns('/proc/self/ns/net'));
	const listening = host.socket(AF_INET, SOCK_STREAM, 0);
	t.teardown(() => {
		native.closeFd(listening);
	});
	native.bind(listening, sockaddr([127, 0, 0, 1], 0));
	native.listen(listening, 64);
	const port = portOf(native.getsockname(listening));
	return () => {
		const {status, stderr} = spawnSync('bash', ['-c', `echo $$ > '${directory}/cgroup.procs' && exec 3<>/dev/tcp/127.0.0.1/${port}`], {encoding: 'utf8', env: {PATH: process.env['PATH'], LC_ALL: 'C'}});
		if (status !== 0 && !stderr.includes('Operation not permitted')) {
			throw new Error(`the client failed otherwise: ${stderr}`);
		}

		return status === 0;
	};
}

function programs(t: ExecutionContext): {readonly allow: BpfProgram; readonly refuse: BpfProgram} {
	const object = loaded(t, 'small_kinds');
	return {allow: held(t, object.program('allow')), refuse: held(t, object.program('refuse'))};
}

test('a cgroup link decides for processes inside the cgroup until it is closed', t => {
	const directory = cgroup(t);
	const reaches = reach(t, directory);
	const {refuse} = programs(t);
	t.true(reaches());
	const link = refuse.attachCgroup(directory);
	t.false(reaches());
	t.deepEqual({...link.info(), id: 0}, {id: 0, type: 3, programId: refuse.info().id, attachType: connect4, targetId: native.cgroupId(directory)});
	t.deepEqual(native.cgroupPrograms(directory, connect4), [refuse.info().id]);
	link.close();
	t.true(reaches());
	t.deepEqual(native.cgroupPrograms(directory, connect4), []);
});

test('update replaces the running program in place', t => {
	const directory = cgroup(t);
	const reaches = reach(t, directory);
	const {allow, refuse} = programs(t);
	const link = held(t, allow.attachCgroup(directory));
	const {id} = link.info();
	t.true(reaches());
	link.update(refuse);
	t.false(reaches());
	t.is(link.info().id, id);
	t.is(link.info().programId, refuse.info().id);
	t.throws(() => {
		link.update({} as never);
	}, {instanceOf: TypeError});
});

test('a program of another type does not replace it', t => {
	const {allow} = programs(t);
	const link = held(t, allow.attachCgroup(cgroup(t)));
	const other = held(t, loaded(t, 'small').program('count'));
	kernelError(t, 'EINVAL', () => {
		link.update(other);
	});
	t.is(link.info().programId, allow.info().id);
});

test('a pinned link outlives its handle, is found again, and ends with its last pin and handle', t => {
	const directory = cgroup(t);
	const reaches = reach(t, directory);
	const {allow, refuse} = programs(t);
	const pin = `${bpffs(t)}/link`;
	const link = held(t, refuse.attachCgroup(directory));
	link.pin(pin);
	const {id} = link.info();
	link.close();
	t.false(reaches());

	const again = held(t, native.openPinnedLink(pin));
	t.is(again.info().id, id);
	again.update(allow);
	t.true(reaches());
	again.update(refuse);
	unlinkSync(pin);
	t.false(reaches());
	again.close();
	t.true(reaches());
});

test('detach ends a link that is still pinned, and tells so', t => {
	const directory = cgroup(t);
	const reaches = reach(t, directory);
	const {refuse} = programs(t);
	const link = held(t, refuse.attachCgroup(directory));
	link.pin(`${bpffs(t)}/link`);
	link.detach();
	t.true(reaches());
	t.is(link.info().targetId, 0n);
	kernelError(t, 'ENOLINK', () => {
		link.update(refuse);
	});
});

test('a link is found by its id', t => {
	const {allow} = programs(t);
	const link = held(t, allow.attachCgroup(cgroup(t)));
	const {id} = link.info();
	t.is(held(t, native.openLinkById(id)).info().id, id);
	t.true(native.ids('link').includes(id));
	t.throws(() => native.ids('socket' as never), {instanceOf: TypeError});
});

test('a directory that is no cgroup, or is not there, is told by the kernel\'s word', t => {
	const {allow} = programs(t);
	kernelError(t, 'EBADF', () => allow.attachCgroup('/tmp'));
	const error = kernelError(t, 'ENOENT', () => allow.attachCgroup('/sys/fs/cgroup/nothing-here'));
	t.is(error.message, 'open /sys/fs/cgroup/nothing-here: ENOENT: no such file or directory');
});

test('a closed link refuses everything but close', t => {
	const {allow} = programs(t);
	const link = allow.attachCgroup(cgroup(t));
	link.close();
	link.close();
	for (const act of [
		() => link.fd,
		() => link.info(),
		() => {
			link.update(allow);
		},
		() => {
			link.detach();
		},
	]) {
		kernelError(t, 'EBADF', act);
	}
});
