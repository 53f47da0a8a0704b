/** The two naive variants of acceleration (test/fixtures/naive_*.bpf.c) on a world's cgroup. */
import {fileURLToPath} from 'node:url';
import {isNativeError, native, type BpfMap, type BpfProgram} from '../../src/native.js';
import type {World} from '../helpers/world.js';

export type Naive = 'naive_known_peer' | 'naive_two_queues';

/** sk_msg onto a sockhash: a link where the kernel has them (6.10). */
function attachToMap(program: BpfProgram, map: BpfMap): () => void {
	try {
		const link = program.attachMap(map);
		return () => {
			link.close();
		};
	} catch (error) {
		if (!isNativeError(error) || error.code !== 'EINVAL') {
			throw error;
		}
	}

	program.attachMapLegacy(map);
	return () => {
		program.detachMap(map);
	};
}

/**
@param cgroup - whose sockets it takes.
@returns how many messages it has redirected so far. Gone with the world.
*/
export function attachNaive(world: World, name: Naive, cgroup = world.cgroup): () => bigint {
	const object = native.openObject(fileURLToPath(new URL(`../../../build/test/${name}.bpf.o`, import.meta.url)));
	world.onEnd(() => {
		object.close();
	});
	object.load();
	const [sockets, redirected] = [object.map('sockets'), object.map('redirected')];
	const [enrol, redirect] = [object.program('enrol'), object.program('redirect')];
	world.onEnd(() => {
		for (const handle of [sockets, redirected, enrol, redirect]) {
			handle.close();
		}
	});
	world.onEnd(attachToMap(redirect, sockets));
	const link = enrol.attachCgroup(cgroup);
	world.onEnd(() => {
		link.close();
	});
	return () => Buffer.from(redirected.lookup(Buffer.alloc(4))!).readBigUInt64LE();
}
