/**
What others are told after a pod's rules are in force: ztunnel, which is handed its namespace; then, when ztunnel has agreed, whoever reads the pod's annotation; and events about what
cannot be honoured. Level-triggered: told again as often as a pod is looked at.
*/
import type {PodSpec} from '../config/pods-file.js';
import {reasonOf} from '../errors.js';
import type {PodObject} from '../kubernetes/objects.js';
import type {EventWriter, StatusWriter} from '../kubernetes/status.js';
import {reopenNetns, type PodNetns} from '../pods/facts.js';
import type {Round} from '../pods/reconcile.js';
import type {ZdsServer} from '../zds/server.js';

export interface AnnouncerOptions {
	readonly zds: ZdsServer;
	readonly status: StatusWriter;
	readonly events: EventWriter;
	/** By namespace/name. */
	readonly pod: (name: string) => PodObject | undefined;
	readonly spec: (name: string) => PodSpec | undefined;
	/** Undefined for a pod that is not enrolled as it should be. */
	readonly namespaceOf: (name: string) => PodNetns | undefined;
	/** Of the kernel's entries for a pod of this name. */
	readonly modeInKernel: (name: string) => string | undefined;
	readonly log: (line: string) => void;
}

export class Announcer {
	/** Pods that somebody was told about: by name, and back. */
	readonly #uids = new Map<string, string>();
	readonly #names = new Map<string, string>();

	constructor(readonly options: AnnouncerOptions) {}

	round({looked, failures}: Round): void {
		for (const name of looked) {
			this.#announce(name, failures.get(name));
		}
	}

	/** What these pods show is perhaps not what was reported last. Of those that no round has looked at yet, one will. */
	reported(names: Iterable<string>): void {
		for (const name of names) {
			if (this.#uids.get(name) === this.options.pod(name)?.uid) {
				this.#announce(name, undefined);
			}
		}
	}

	/** ztunnel has said something new about a workload. */
	decided(uid: string): void {
		const name = this.#names.get(uid);
		const pod = name === undefined ? undefined : this.options.pod(name);
		if (pod?.uid === uid) {
			this.#report(pod);
		}
	}

	#announce(name: string, failure: Error | undefined): void {
		const {zds, status, events} = this.options;
		const pod = this.options.pod(name);
		const former = this.#uids.get(name);
		if (former !== undefined && former !== pod?.uid) {
			zds.remove(former);
			status.forget(former);
			this.#uids.delete(name);
			this.#names.delete(former);
		}

		const wish = this.options.spec(name)?.wish;
		if (!pod || !wish) {
			return;
		}

		if (!('leave' in wish) && !zds.has(pod.uid) && !this.options.namespaceOf(name) && this.options.modeInKernel(name) === 'ambient') {
			// It stays captured, so ztunnel has to keep what it has of it.
			this.#put(pod, undefined);
		}

		if ('waiting' in wish) {
			return;
		}

		this.#uids.set(name, pod.uid);
		this.#names.set(pod.uid, name);
		if ('refused' in wish) {
			events.report(pod, {type: 'Warning', reason: 'CaptureRefused', message: `${wish.refused.message}; what was in force for the pod stays`});
			return;
		}

		if (failure) {
			events.report(pod, {type: 'Warning', reason: 'CaptureFailed', message: failure.message});
		}

		if ('leave' in wish || wish.capture.mode !== 'ambient') {
			zds.remove(pod.uid);
			status.set(pod, undefined);
		}

		if ('leave' in wish) {
			return;
		}

		for (const warning of wish.warnings) {
			events.report(pod, {type: 'Warning', reason: 'AnnotationIgnored', message: warning});
		}

		if (wish.capture.mode === 'ambient') {
			const file = this.options.namespaceOf(name);
			if (file) {
				this.#put(pod, file);
			}

			if (file || pod.deletionTimestamp === undefined) {
				this.#report(pod);
			}
		}
	}

	#put({uid, namespace, name, serviceAccount}: PodObject, netns: PodNetns | undefined): void {
		try {
			this.options.zds.put({uid, name, namespace, serviceAccount, cookie: netns?.cookie, openNetns: () => netns && reopenNetns(netns, netns.cookie)});
			this.#uids.set(`${namespace}/${name}`, uid);
			this.#names.set(uid, `${namespace}/${name}`);
		} catch (error) {
			this.options.log(`ztunnel cannot be told of pod ${namespace}/${name} (${reasonOf(error)})`);
		}
	}

	/** The last of all steps. */
	#report(pod: PodObject): void {
		const {zds, status, events, namespaceOf} = this.options;
		const state = zds.state(pod.uid);
		const isEnrolled = namespaceOf(`${pod.namespace}/${pod.name}`) !== undefined;
		if (state.kind === 'refused') {
			events.report(pod, {type: 'Warning', reason: 'ZtunnelRefused', message: `ztunnel does not serve the pod: ${state.error}`});
		}

		if (isEnrolled && state.kind === 'acknowledged') {
			status.set(pod, 'enabled');
		} else if (!isEnrolled || state.kind === 'refused' || !zds.connections.some(({isCurrent}) => isCurrent)) {
			// With a ztunnel that is about to answer, it would be true for a moment only.
			status.set(pod, 'pending');
		}
	}
}
