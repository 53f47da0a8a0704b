/**
Answers the CNI plugin: a pod may start once it is captured as it should be.
*/
import {CniRetry, type CniCall, type CniHandler} from '../cni/server.js';
import {PodError} from '../errors.js';
import {KubernetesError} from '../kubernetes/errors.js';
import type {NetnsFile} from '../pods/facts.js';
import type {Round} from '../pods/reconcile.js';
import type {ZdsServer} from '../zds/server.js';
import type {NodePods} from './pods.js';

export interface CallsOptions {
	readonly pods: NodePods;
	readonly zds: ZdsServer;
	/** Looks at a pod now; undefined while the agent is starting. */
	readonly look: (name: string) => Round | undefined;
	readonly namespaceOf: (name: string) => NetnsFile | undefined;
}

/** ztunnel's own deadline for an answer is 5 s (CAPTURE.md); what takes longer is asked for again. */
const ZTUNNEL_MS = 6000;

export function cniHandler({pods, zds, look, namespaceOf}: CallsOptions): CniHandler {
	return {
		async add(call, signal) {
			const name = nameOf(call);
			if (name === undefined) {
				return;
			}

			if (!pods.isSynced) {
				throw new CniRetry('the agent is starting, and has not heard of all pods yet');
			}

			const {pod, wish} = await pods.call({name, uid: call.podUid, sandbox: call.containerId, ips: call.ips, netns: call.netns}, signal).catch((error: unknown) => {
				throw error instanceof KubernetesError ? new CniRetry(`the pod cannot be read: ${error.message}`, {cause: error}) : error;
			});
			if ('leave' in wish) {
				return;
			}

			if ('refused' in wish) {
				throw wish.refused;
			}

			if ('waiting' in wish) {
				throw new CniRetry(wish.waiting);
			}

			const round = look(name);
			if (!round) {
				throw new CniRetry('the agent is starting');
			}

			const failure = round.failures.get(name);
			if (failure) {
				throw failure;
			}

			const file = namespaceOf(name);
			if (!file || !pods.isAt(pod.uid, file)) {
				throw new CniRetry('it is not captured yet: its addresses are not known');
			}

			if (wish.capture.mode !== 'ambient') {
				return;
			}

			const state = await zds.settled(pod.uid, ZTUNNEL_MS);
			if (state.kind === 'waiting') {
				throw new CniRetry(`ztunnel does not serve it yet: ${state.why}`);
			}

			if (state.kind === 'refused') {
				throw new PodError(name, `ztunnel does not serve it: ${state.error}`);
			}
		},

		async check(call) {
			const name = nameOf(call);
			const spec = name === undefined ? undefined : pods.specs.get(name);
			if (name !== undefined && spec && 'capture' in spec.wish && !namespaceOf(name)) {
				throw new PodError(name, 'it is not captured as it should be: `sidestep pods` and the agent\'s log tell more');
			}
		},

		async del(call) {
			const name = nameOf(call);
			if (name !== undefined) {
				pods.forget(name, call.podUid, call.containerId);
			}
		},
	};
}

/** @returns undefined for a container that Kubernetes did not ask for: its runtimes always tell both. */
function nameOf({podName, podNamespace}: CniCall): string | undefined {
	return podName === '' || podNamespace === '' ? undefined : `${podNamespace}/${podName}`;
}
